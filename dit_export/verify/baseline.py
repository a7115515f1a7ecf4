"""A bundle's figures as a small file to commit: the gate fails when a later build's are worse than it allows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_export.verify.metrics import Metric
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.errors import UsageError
from dit_runtime.replay import Reference, relative_error
from dit_runtime.sampling.noise import Noise
from dit_runtime.verify import TOLERANCES, jsonable

FORMAT = 1
MARGIN = 1.25  # how much larger an error may become
PROJECTIONS = 4
FP32 = TOLERANCES["fp32"]
REFERENCE_TOLERANCE = FP32.latents  # PyTorch on another CPU, after a run in fp32; as for the engines' own free run
FLOORS = {"conditioner": FP32.conditioner, "denoiser": FP32.prediction, "run": FP32.latents}  # of rel-L2, by graph

# By unit: the limit that a measured figure sets. Floors are fp32's tolerances: kernels of other CPUs differ by less.
LIMITS: dict[str, Callable[[Metric], float]] = {
    "rel-L2": lambda found: max(MARGIN * found.value, FLOORS[found.graph]),
    # 1 - cosine grows with the square of rel-L2.
    "cosine": lambda found: 1 - max(MARGIN**2 * (1 - found.value), FLOORS[found.graph] ** 2),
    "PSNR in dB": lambda found: min(found.value - 20 * math.log10(MARGIN), FP32.pictures),
    "SSIM": lambda found: 1 - max(MARGIN**2 * (1 - found.value), 1e-4),
    "contrast": lambda found: max(found.value / 2, 1.0),
    "share": lambda found: found.value - 0.005,  # the judge's agreement: half a point
    "Fréchet distance": lambda found: 1.03 * found.value,
    "score": lambda found: found.value / 1.03,  # Inception Score
}


def identity(contract: Manifest, reference: Reference) -> dict[str, Any]:
    """What a baseline belongs to: the network, its weights, and the run that its figures are of."""
    source = contract.source
    weights: dict[str, Any] = {key: source[key] for key in ("kind", "seed") if key in source}
    for part, sums in (("sha256", source.get("sha256")), ("vae", source.get("vae", {}).get("sha256"))):
        if sums:
            weights[part] = sorted(sums.values())
    return {
        "model": dict(contract.model),
        "weights": weights,
        "run": {
            "solver": contract.diffusion.sampler.solver,
            "timesteps": [float(t) for t in reference.timesteps],
            "labels": [int(label) for label in reference.labels],
            "guidance": [float(weight) for weight in reference.guidance],
        },
    }


def projections(reference: Reference) -> list[float]:
    """A few numbers that tell whether PyTorch still gives the answer the baseline was measured against."""
    found: list[float] = []
    middle = len(reference.timesteps) // 2
    for array in (reference.conditional[middle], reference.null[middle], reference.latents[-1]):
        rows = array.astype(np.float64).reshape(1, -1)
        found += (rows @ Noise(0).normal((rows.shape[1], PROJECTIONS)) / math.sqrt(rows.shape[1]))[0].tolist()
    return [float(f"{value:.9g}") for value in found]


def write(
    path: Path, contract: Manifest, reference: Reference, metrics: Sequence[Metric], settings: Mapping[str, Any]
) -> None:
    """Values and limits by metric; the caller has seen that all of them pass."""
    groups: dict[tuple[str, str], list[Metric]] = {}
    for metric in metrics:
        if metric.unit in LIMITS:
            groups.setdefault(metric.key, []).append(metric)
    lines = []
    for (graph, title), same in groups.items():
        entry = {
            "graph": graph,
            "metric": title,
            "values": [_rounded(metric.value, metric) for metric in same],
            "limits": [_rounded(LIMITS[metric.unit](metric), metric) for metric in same],
        }
        lines.append("  " + json.dumps(entry, ensure_ascii=False))
    measured = {
        "precisions": {name: f"{graph.precision} on {graph.backend}" for name, graph in contract.graphs.items()},
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
    path.write_text(text, encoding="utf-8")


def _rounded(value: float, metric: Metric) -> float | str:
    """Four digits; those of a cosine and of SSIM are of their distance from 1."""
    return jsonable(round(value, 10) if metric.unit in ("cosine", "SSIM") else float(f"{value:.4g}"))


def read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no baseline here; write one with --update-baseline") from None
    except ValueError as error:
        raise UsageError(f"{path}: not a baseline: {error}") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise UsageError(f"{path}: not a baseline of format {FORMAT}; write one with --update-baseline")
    missing = [key for key in ("model", "weights", "run", "reference", "measured", "metrics") if key not in table]
    if missing:
        raise UsageError(f"{path}: lacks {', '.join(missing)}; write it again with --update-baseline")
    return table


def require_same(path: Path, table: Mapping[str, Any], contract: Manifest, reference: Reference) -> None:
    """Refuses the figures of another model, of other weights, or of another run."""
    for key, got in json.loads(json.dumps(identity(contract, reference))).items():
        expected = table[key]
        wrong = sorted(name for name in {*got, *expected} if got.get(name) != expected.get(name))
        if wrong:
            raise UsageError(
                f"{path}: of another {key}: {wrong[0]} is {expected.get(wrong[0])} there and {got.get(wrong[0])} in "
                "this bundle; take its own baseline, or write it anew with --update-baseline"
            )


def apply(path: Path, table: Mapping[str, Any], reference: Reference, metrics: Sequence[Metric]) -> list[Metric]:
    """The metrics with the baseline's limits; what it has and was not measured fails."""
    try:
        limits = {(row["graph"], row["metric"]): [float(limit) for limit in row["limits"]] for row in table["metrics"]}
        before = np.array(table["reference"], np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: malformed: {type(error).__name__}: {error}; write it again") from None
    drift = relative_error(np.array(projections(reference)), before)
    where = (
        "" if drift <= REFERENCE_TOLERANCE else "PyTorch's answer is not the one that the baseline was measured against"
    )
    found = [Metric("reference", "drift", "rel-L2", drift, where, limit=REFERENCE_TOLERANCE)]
    taken: dict[tuple[str, str], int] = {}
    for metric in metrics:
        index, known = taken.get(metric.key, 0), limits.get(metric.key, [])
        taken[metric.key] = index + 1
        found.append(replace(metric, limit=known[index]) if index < len(known) else metric)
    for (graph, title), known in limits.items():
        if taken.get((graph, title), 0) < len(known):
            name, _, unit = title.rpartition(", ")
            found.append(Metric(graph, name, unit, math.nan, "not measured", limit=known[0]))
    return found
