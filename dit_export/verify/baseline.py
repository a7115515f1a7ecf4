"""A bundle's figures as a small file to commit: the gate fails when a later build's are worse than it allows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_export.verify.metrics import unit
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.errors import UsageError
from dit_runtime.files import read_json, write_file
from dit_runtime.sampling.noise import Noise
from dit_runtime.verify import TOLERANCES, Figure, Reference, jsonable, relative_error

FORMAT = 2
MARGIN = 1.25  # how much larger an error may become
PROJECTIONS = 4
FP32 = TOLERANCES["fp32"]
REFERENCE_TOLERANCE = FP32.latents  # PyTorch on another CPU, after a run in fp32; as for the engines' own free run
FLOORS = {"latents": FP32.latents}  # of rel-L2 by metric; of all others fp32's of one evaluation

# By unit: the limit that a measured figure sets. Floors are fp32's tolerances: kernels of other CPUs differ by less.
LIMITS: dict[str, Callable[[Figure], float]] = {
    "rel-L2": lambda figure: max(MARGIN * figure.value, _floor(figure)),
    # 1 - cosine grows with the square of rel-L2.
    "cosine": lambda figure: 1 - max(MARGIN**2 * (1 - figure.value), _floor(figure) ** 2),
    "PSNR in dB": lambda figure: min(figure.value - 20 * math.log10(MARGIN), FP32.pictures),
    "SSIM": lambda figure: 1 - max(MARGIN**2 * (1 - figure.value), 1e-4),
    "contrast": lambda figure: max(figure.value / 2, 1.0),
    "share": lambda figure: figure.value - 0.005,  # the judge's agreement: half a point
    "Fréchet distance": lambda figure: 1.03 * figure.value,
    "score": lambda figure: figure.value / 1.03,  # Inception Score
}


def _floor(figure: Figure) -> float:
    return FLOORS.get(figure.metric.rpartition(", ")[0], FP32.prediction)


def identity(contract: Manifest, reference: Reference) -> dict[str, Any]:
    """Return what a baseline belongs to: the network, its weights, and the run of its figures."""
    source = contract.source
    weights: dict[str, Any] = {key: source[key] for key in ("kind", "seed") if key in source}
    for part, sums in (("sha256", source.get("sha256")), ("vae", source.get("vae", {}).get("sha256"))):
        if sums:
            weights[part] = sorted(sums.values())
    return {
        "model": dict(contract.model),
        "weights": weights,
        "run": {
            "solver": contract.process.sampler.solver,
            "timesteps": [float(t) for t in reference.timesteps],
            "conditions": {name: _digest(rows) for name, rows in reference.condition.items()},
            "guidance": [float(weight) for weight in reference.guidance],
        },
    }


def _digest(rows: NDArray[Any]) -> list[int] | str:
    """Return the values of a small port, and of a large one a sum of its bytes."""
    return rows.tolist() if rows.ndim == 1 else hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()[:16]


def projections(reference: Reference) -> list[float]:
    """A few numbers that tell whether PyTorch still gives the answer the baseline was measured against."""
    numbers: list[float] = []
    middle = len(reference.timesteps) // 2
    null = [reference.null[middle]] if reference.null.size else []
    for array in (reference.conditional[middle], *null, reference.latents[-1]):
        rows = array.astype(np.float64).reshape(1, -1)
        numbers += (rows @ Noise(0).normal((rows.shape[1], PROJECTIONS)) / math.sqrt(rows.shape[1]))[0].tolist()
    return [float(f"{value:.9g}") for value in numbers]


def write(
    path: Path, contract: Manifest, reference: Reference, figures: Sequence[Figure], settings: Mapping[str, Any]
) -> None:
    """Write values and limits by metric; the caller has seen that all of them pass."""
    groups: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        if unit(figure) in LIMITS:
            groups.setdefault((figure.stage, figure.metric), []).append(figure)
    lines = []
    for (stage, metric), same in groups.items():
        entry = {
            "stage": stage,
            "metric": metric,
            "values": [_rounded(figure.value, figure) for figure in same],
            "limits": [_rounded(LIMITS[unit(figure)](figure), figure) for figure in same],
        }
        lines.append("  " + json.dumps(entry, ensure_ascii=False))
    measured = {
        "precisions": {stage.name: f"{stage.precision} on {stage.backend}" for stage in contract.stages},
        "versions": contract.built_with.get("versions", {}),
        "margin": MARGIN,
        **settings,
    }
    head = {
        "format": FORMAT,
        **identity(contract, reference),
        "reference": projections(reference),
        "measured": measured,
    }
    parts = [f' "{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in head.items()]
    text = "{\n" + ",\n".join(parts) + ',\n "metrics": [\n' + ",\n".join(lines) + "\n ]\n}\n"
    write_file(path, text)


def _rounded(value: float, figure: Figure) -> float | str:
    """Four digits; those of a cosine and of SSIM are of their distance from 1."""
    return jsonable(round(value, 10) if unit(figure) in ("cosine", "SSIM") else float(f"{value:.4g}"))


def read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UsageError(f"{path}: no baseline here; write one with --update-baseline")
    table = read_json(path)
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise UsageError(f"{path}: not a baseline of format {FORMAT}; write one with --update-baseline")
    missing = [key for key in ("model", "weights", "run", "reference", "measured", "metrics") if key not in table]
    if missing:
        raise UsageError(f"{path}: lacks {', '.join(missing)}; write it again with --update-baseline")
    return table


def require_same(path: Path, table: Mapping[str, Any], contract: Manifest, reference: Reference) -> None:
    """Refuse the figures of another model, of other weights, or of another run."""
    for key, got in json.loads(json.dumps(identity(contract, reference))).items():
        expected = table[key]
        wrong = sorted(name for name in {*got, *expected} if got.get(name) != expected.get(name))
        if wrong:
            raise UsageError(
                f"{path}: of another {key}: {wrong[0]} is {expected.get(wrong[0])} there and {got.get(wrong[0])} in "
                "this bundle; take its own baseline, or write it anew with --update-baseline"
            )


def apply(path: Path, table: Mapping[str, Any], reference: Reference, figures: Sequence[Figure]) -> list[Figure]:
    """Return the figures with the baseline's limits; what it has and was not measured fails."""
    try:
        limits = {(row["stage"], row["metric"]): [float(limit) for limit in row["limits"]] for row in table["metrics"]}
        before = np.array(table["reference"], np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: malformed: {type(error).__name__}: {error}; write it again") from None
    drift = relative_error(np.array(projections(reference)), before)
    where = (
        "" if drift <= REFERENCE_TOLERANCE else "PyTorch's answer is not the one that the baseline was measured against"
    )
    limited = [Figure("reference", "drift, rel-L2", drift, REFERENCE_TOLERANCE, where=where)]
    taken: dict[tuple[str, str], int] = {}
    for figure in figures:
        key = figure.stage, figure.metric
        index, known = taken.get(key, 0), limits.get(key, [])
        taken[key] = index + 1
        limited.append(replace(figure, limit=known[index]) if index < len(known) else figure)
    for (stage, metric), known in limits.items():
        if taken.get((stage, metric), 0) < len(known):
            limited.append(Figure(stage, metric, math.nan, known[0], where="not measured"))
    return limited
