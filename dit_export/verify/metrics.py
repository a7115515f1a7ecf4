"""The gate's figures: which graph, which step, how far from PyTorch, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime import images
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.replay import Reference, Replay, relative_error
from dit_runtime.verify import jsonable, sampler, tolerances, worst

AT_LEAST = {"cosine", "PSNR in dB", "SSIM", "contrast", "share", "score"}  # units where more is better


@dataclass(frozen=True)
class Metric:
    graph: str  # conditioner, denoiser, decoder; sampler, run and pictures are of all together
    name: str
    unit: str
    value: float
    where: str = ""
    step: int | None = None  # from 1
    limit: float | None = None  # None: reported, no gate

    @property
    def at_least(self) -> bool:
        return self.unit in AT_LEAST

    @property
    def passed(self) -> bool:
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit  # False for NaN

    @property
    def title(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def key(self) -> tuple[str, str]:
        return self.graph, self.title

    def number(self, value: float) -> str:
        return f"{value:.6f}" if self.unit in ("cosine", "SSIM") else f"{value:.4g}"

    def __str__(self) -> str:
        sign = "at least" if self.at_least else "at most"
        limit = "" if self.limit is None else f", expected {sign} {self.number(self.limit)}"
        place = f", {self.where}" if self.where else ""
        return f"{self.graph}: {self.title}{place}: {self.number(self.value)}{limit}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "graph": self.graph,
            "metric": self.title,
            "step": self.step,
            "where": self.where,
            "value": jsonable(self.value),
            "limit": None if self.limit is None else jsonable(self.limit),
            "at_least": self.at_least,
            "passed": self.passed,
        }


def of_replay(contract: Manifest, reference: Reference, found: Replay) -> list[Metric]:
    """All figures of a replay in the order of cause, with the limits of the graphs' precisions."""
    return [
        *(
            Metric("sampler", check.name, "", check.value, check.where, limit=check.limit)
            for check in sampler(contract, reference)
        ),
        *_conditioner(contract, reference, found),
        *_denoiser(contract, reference, found),
        *_decoder(contract, reference, found),
        *_run(contract, reference, found),
    ]


def wrong_labels(reference: Reference, found: Replay, limit: float) -> NDArray[np.int64]:
    """Labels whose conditioning is not PyTorch's, the worst first; the null label is the last of all labels."""
    errors = _label_errors(reference, found)
    order = np.argsort(-errors, kind="stable")
    return order[~(errors[order] <= limit)]


def _label_errors(reference: Reference, found: Replay) -> NDArray[np.float64]:
    pairs = zip(found.fingerprint, reference.fingerprint, strict=True)
    return np.nan_to_num([relative_error(*pair) for pair in pairs], nan=np.inf)


def _conditioner(contract: Manifest, reference: Reference, found: Replay) -> Iterator[Metric]:
    errors, limit = _label_errors(reference, found), tolerances(contract)["conditioner"].conditioner
    labels, worst = errors[:-1], int(errors[:-1].argmax())
    wrong = int((~(labels <= limit)).sum())
    if wrong == len(labels) > 1:
        where = "every label: stale, or of other weights"
    else:
        where = f"label {worst}" + (f", the worst of {wrong} of {len(labels)}" if wrong > 1 else "")
    yield Metric("conditioner", "labels", "rel-L2", float(labels[worst]), where, limit=limit)
    yield Metric("conditioner", "null label", "rel-L2", float(errors[-1]), f"row {len(labels)}", limit=limit)


def _denoiser(contract: Manifest, reference: Reference, found: Replay) -> Iterator[Metric]:
    limits, steps = tolerances(contract)["denoiser"], len(reference.timesteps)
    for answer in found.answers:
        step, where = answer.step + 1, f"step {answer.step + 1} of {steps}, t = {reference.timesteps[answer.step]:g}"
        limit = limits.guided if answer.name in ("prediction", "variance") else limits.prediction
        yield Metric("denoiser", answer.name, "rel-L2", answer.error, where, step, limit)
        yield Metric("denoiser", answer.name, "cosine", answer.cosine, where, step)


def _decoder(contract: Manifest, reference: Reference, found: Replay) -> Iterator[Metric]:
    if "decoder" in contract.graphs and (found.decoded is not None or "decoded" in found.failures):
        limit = tolerances(contract)["decoder"].pictures
        yield from _pictures(
            "decoder", "PyTorch's latents", reference, found.decoded, found.failures.get("decoded"), limit
        )


def _run(contract: Manifest, reference: Reference, found: Replay) -> Iterator[Metric]:
    limits, steps = tolerances(contract), len(reference.timesteps)
    for index in range(steps):
        where, error = f"after step {index + 1} of {steps}", math.nan
        if index < len(found.latents):
            error = relative_error(found.latents[index], reference.latents[index + 1])
        elif index == len(found.latents):
            where = found.failures["latents"]
        else:
            where += ": not reached"
        yield Metric("run", "latents", "rel-L2", error, where, index + 1, limits["denoiser"].latents)
    if "decoder" in contract.graphs:
        why = found.failures.get("pictures", "the run did not reach them")
        yield from _pictures("run", "pictures", reference, found.pictures, why, limits["decoder"].pictures)
        flat = [math.nan] * len(reference.images)
        if found.pictures is not None:
            flat = [float(picture.astype(np.float64).std()) for picture in found.pictures]
        for sample, deviation in enumerate(flat):
            yield Metric("run", "pictures", "contrast", deviation, f"sample {sample}", limit=1.0)


def _pictures(
    graph: str, name: str, reference: Reference, found: NDArray[np.uint8] | None, failure: str | None, limit: float
) -> Iterator[Metric]:
    for unit, measure, least in (("PSNR in dB", images.psnr, limit), ("SSIM", images.ssim, None)):
        for sample, expected in enumerate(reference.images):
            value = math.nan if found is None else measure(found[sample], expected)
            where = f"sample {sample}" + (f": {failure}" if found is None and failure else "")
            yield Metric(graph, name, unit, value, where, limit=least)


def rows(metrics: Sequence[Metric]) -> list[Metric]:
    return worst(metrics, "key")


def table(metrics: Sequence[Metric]) -> str:
    lines = [f"{'graph':<12} {'metric':<30} {'worst':>9}  {'limit':>11}"]
    for row in rows(metrics):
        sign, mark = ">=" if row.at_least else "<=", "ok" if row.passed else "FAILED"
        limit = "–" if row.limit is None else f"{sign} {row.number(row.limit)}"
        value, mark = row.number(row.value), "–" if row.limit is None else mark
        lines.append(f"{row.graph:<12} {row.title:<30} {value:>9}  {limit:>11}  {mark:<6}  {row.where}".rstrip())
    return "\n".join(lines)
