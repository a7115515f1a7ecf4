"""A replay's figures in the order of cause: the gates of `dit-run verify`, and what tells more about a failure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime import images
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.conditions.condition import Rows
from dit_runtime.verify import TOLERANCES, Figure, Reference, Replay, judge, relative_error
from dit_runtime.verify.reference import fingerprinted

PROOF, SAMPLER, RUN = "proof", "sampler", "run"  # stages of figures that are none of a bundle's
SHOWN = 6  # layers in a line


class Fingerprinted(NamedTuple):
    """The conditions that the reference has fingerprints of."""

    rows: Rows
    names: list[str]  # what to call each row
    null: NDArray[np.int64]  # which rows are what guidance leads away from


def fingerprinted_rows(contract: Manifest, reference: Reference) -> Fingerprinted:
    rows, count = fingerprinted(contract.conditions, reference)
    names = [f"condition {row}" for row in range(count)]
    for port, values in rows.items():
        if len(rows) == values.ndim == 1 and values.dtype == np.int64:  # all values of the only port
            names = [f"{port} {value}" for value in values]
    null = np.empty(0, np.int64)
    if reference.negative is not None:
        equal = [(values == reference.negative[name]).reshape(count, -1).all(1) for name, values in rows.items()]
        null = np.flatnonzero(np.logical_and.reduce(equal))
    for row in null:
        names[row] = f"the null ({names[row]})"
    return Fingerprinted(rows, names, null)


def fingerprint_errors(reference: Reference, answers: Replay) -> NDArray[np.float64]:
    pairs = zip(answers.fingerprint, reference.fingerprint, strict=True)
    return np.nan_to_num([relative_error(*pair) for pair in pairs], nan=np.inf)


def figures_of(contract: Manifest, reference: Reference, answers: Replay) -> list[Figure]:
    """Return the judge's figures, the null's fingerprint apart, with cosines, SSIM and the decoder by itself."""
    gates = [figure for figure in judge(contract, reference, answers) if not figure.metric.startswith("fingerprint")]
    more = [
        *_fingerprints(contract, reference, answers),
        *_cosines(contract, reference, answers),
        *_decoded(contract, reference, answers),
        *_similarity(RUN, "pictures", reference, answers.pictures),
    ]
    return by_cause(contract, [*gates, *more])


def by_cause(contract: Manifest, figures: Iterable[Figure]) -> list[Figure]:
    """Sort by stage: what a stage reads comes before it; figures of one stage stay in their order."""
    before = "+".join(stage.name for stage in contract.before_loop)
    stages = [PROOF, SAMPLER, before, *(stage.name for stage in contract.stages), RUN]
    return sorted(figures, key=lambda figure: stages.index(figure.stage) if figure.stage in stages else len(stages))


def unit(figure: Figure) -> str:
    return figure.metric.rpartition(", ")[2]


def number(figure: Figure, value: float) -> str:
    return f"{value:.6f}" if unit(figure) in ("cosine", "SSIM") else f"{value:.4g}"


def sentence(figure: Figure) -> str:
    """Say what was measured where, and what was expected."""
    place = f", {figure.where}" if figure.where else ""
    limit = ""
    if figure.limit is not None:
        limit = f", expected at {'least' if figure.at_least else 'most'} {number(figure, figure.limit)}"
    return f"{figure.name}{place}: {number(figure, figure.value)}{limit}"


def text_in_fp32(contract: Manifest) -> str:
    """Say why the text encoders are in fp32 where a bundle has another precision; "" where they are not."""
    reason = contract.built_with.get("text_in_fp32")
    return f"the text encoders are in fp32, for in {contract.step.precision} a gate fails: {reason}" if reason else ""


def kept_in_float(cost: Mapping[str, Any], precision: str) -> list[str]:
    """Say which layers stayed float for which gate, and what it cost; `cost` is the manifest's `kept_float`."""
    names, count = cost["layers"], len(cost["layers"])
    shown = ", ".join(names[:SHOWN]) + (f" and {count - SHOWN} more" if count > SHOWN else "")
    lines = [f"in float, so that these limits hold: {shown} ({count} of {cost['of']} layers)"]
    for gate in cost["gates"]:
        before, after, limit = (_short(gate[key]) for key in ("before", "after", "limit"))
        lines.append(f"{gate['name']}: {before} with them in {precision}, {after} in float, limit {limit}")
    if "step_time" in cost:
        lines.append(f"a guided step takes {cost['step_time']:.2f} times as long as with them in {precision}")
    return lines


def _short(value: float | str | None) -> str:
    return f"{value:.3g}" if isinstance(value, float | int) else str(value)


def insensitive(folder: Path, proof: Sequence[Figure]) -> str:
    """Warn that parity on these weights proves little."""
    figures = "; ".join(f"{figure.metric}: {figure.value:.2g}, expected {figure.limit:.2g}" for figure in proof)
    return (
        "warning: these weights hardly react to condition, guidance or timestep, so parity on them proves little "
        f"(insensitive in {folder}/parity.json; {figures})"
    )


def _fingerprints(contract: Manifest, reference: Reference, answers: Replay) -> Iterator[Figure]:
    stages = contract.before_loop
    if not stages:
        return
    name, limit = "+".join(stage.name for stage in stages), max(TOLERANCES[s.precision].conditioner for s in stages)
    errors, named = fingerprint_errors(reference, answers), fingerprinted_rows(contract, reference)
    own = np.setdiff1d(np.arange(len(errors)), named.null)
    wrong = own[~(errors[own] <= limit)]
    worst = own[errors[own].argmax()]
    where = named.names[worst]
    if len(wrong) == len(own) > 1:
        where = "every condition: stale, or of other weights"
    elif len(wrong) > 1:
        where += f", the worst of {len(wrong)} of {len(own)}"
    yield Figure(name, "fingerprint, rel-L2", float(errors[worst]), limit, where=where)
    for row in named.null:
        yield Figure(name, "fingerprint of the null, rel-L2", float(errors[row]), limit, where=named.names[row])


def _cosines(contract: Manifest, reference: Reference, answers: Replay) -> Iterator[Figure]:
    steps = len(reference.timesteps)
    for answer in answers.answers:
        step, metric = answer.step + 1, f"{answer.name}, cosine"
        where = f"step {step} of {steps}, t = {reference.timesteps[answer.step]:g}"
        yield Figure(contract.step.name, metric, answer.cosine, at_least=True, step=step, where=where)


def _decoded(contract: Manifest, reference: Reference, answers: Replay) -> Iterator[Figure]:
    """The decoder with PyTorch's latents, where a thorough replay has asked it."""
    end = contract.end
    if end is None or (answers.decoded is None and "decoded" not in answers.failures):
        return
    metric, limit = "PyTorch's latents, PSNR in dB", TOLERANCES[end.precision].pictures
    if answers.decoded is None:
        yield Figure(end.name, metric, math.nan, limit, at_least=True, where=answers.failures["decoded"])
        return
    for sample, pair in enumerate(zip(answers.decoded, reference.images, strict=True)):
        yield Figure(end.name, metric, images.psnr(*pair), limit, at_least=True, where=f"sample {sample}")
    yield from _similarity(end.name, "PyTorch's latents", reference, answers.decoded)


def _similarity(
    stage: str, name: str, reference: Reference, pictures: Sequence[NDArray[np.uint8]] | NDArray[np.uint8] | None
) -> Iterator[Figure]:
    for sample, pair in enumerate(zip(pictures, reference.images, strict=True) if pictures is not None else ()):
        yield Figure(stage, f"{name}, SSIM", images.ssim(*pair), at_least=True, where=f"sample {sample}")
