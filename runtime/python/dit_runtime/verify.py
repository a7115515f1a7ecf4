"""Replays reference.npz, PyTorch's own answer, with NumPy and the engines alone.

The reference holds one sampling run in fp32. Per step the engine is asked the same question as PyTorch was
(teacher-forced: its error is the engine's own), then it runs freely from the same noise to the same pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime import images, manifest
from dit_runtime.errors import BundleError
from dit_runtime.noise import Noise, draw
from dit_runtime.pipeline import EngineError, Pipeline
from dit_runtime.solvers import plan

REFERENCE = "reference.npz"
FINGERPRINTS = 4  # numbers kept of each label's conditioning
FINGERPRINT_SEED = 0


@dataclass(frozen=True)
class Tolerances:
    """Largest errors at one precision; relative L2 against the reference's norm unless said otherwise."""

    conditioner: float
    prediction: float  # one teacher-forced evaluation
    latents: float  # at the end of the free run
    pictures: float  # least PSNR in dB of the uint8 pictures of the free run


TOLERANCES = {
    # fp32 sums in another order: measured 2e-6 to 8e-6 an evaluation; the rest is room for other CPUs' kernels. The
    # free run adds a step's error to the next; one level of 255 everywhere would be 48 dB.
    "fp32": Tolerances(conditioner=1e-4, prediction=1e-4, latents=1e-3, pictures=55.0),
    "bf16": Tolerances(conditioner=1e-4, prediction=5e-2, latents=5e-2, pictures=25.0),
    "fp16": Tolerances(conditioner=1e-4, prediction=5e-3, latents=1e-2, pictures=35.0),
}
NOISE_ATOL = 1e-5  # PyTorch's vector code differs from libm's by an ulp of values up to 5


class Reference(NamedTuple):
    """S steps of a run of B samples; every array is float32 unless said otherwise."""

    betas: NDArray[np.float64]  # (T,)
    timesteps: NDArray[np.float64]  # (S,)
    labels: NDArray[np.int64]  # (B,)
    seeds: NDArray[np.int64]  # (B,)
    guidance: NDArray[np.float32]  # (B,)
    latents: NDArray[np.float32]  # (S + 1, B, C, H, W): what the network saw at each step, and the result
    prediction: NDArray[np.float32]  # (S, B, C, H, W), guided
    conditional: NDArray[np.float32]  # (S, B, C, H, W), without guidance
    null: NDArray[np.float32]  # (S, B, C, H, W), of the null label
    variance: NDArray[np.float32]  # (S, B, C, H, W), or empty where it is not learned
    fingerprint: NDArray[np.float32]  # (classes + 1, FINGERPRINTS) of the conditioning at the middle timestep
    images: NDArray[np.uint8]  # (B, 8H, 8W, 3), or empty without a decoder


@dataclass(frozen=True)
class Check:
    """One gate: what was measured where, and what it must keep to."""

    name: str
    value: float
    limit: float
    at_least: bool = False  # the value must reach the limit, else stay below it
    where: str = ""

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit  # False for NaN

    def to_dict(self) -> dict[str, Any]:
        value = self.value if math.isfinite(self.value) else str(self.value)  # JSON knows no NaN
        return asdict(self) | {"value": value, "passed": self.passed}


def relative_error(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """||value − reference|| / ||reference||; NaN and inf stay what they are."""
    difference = value.astype(np.float64) - reference
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(reference.astype(np.float64))), 1e-30))


def fingerprint(
    condition: Callable[..., NDArray[Any]], num_classes: int, timestep: float, max_rows: int
) -> NDArray[np.float32]:
    """Every label's conditioning at one timestep, projected onto a few seeded random directions."""
    rows, directions = [], None
    for first in range(0, num_classes + 1, max_rows):
        labels = np.arange(first, min(first + max_rows, num_classes + 1))
        vectors = condition(np.full(len(labels), timestep, np.float32), labels).reshape(len(labels), -1)
        if directions is None:
            directions = Noise(FINGERPRINT_SEED).normal((vectors.shape[1], FINGERPRINTS)) / math.sqrt(vectors.shape[1])
        rows.append(vectors @ directions)
    return np.concatenate(rows).astype(np.float32)


def load_reference(folder: Path) -> Reference:
    import zipfile  # here, so that importing the runtime stays quick

    try:
        with np.load(manifest.inside(folder, REFERENCE), allow_pickle=False) as arrays:
            missing = set(Reference._fields) - set(arrays.files)
            if missing:
                raise BundleError(f"{folder}: {REFERENCE} lacks {', '.join(sorted(missing))}; rebuild the bundle")
            return Reference(**{name: arrays[name] for name in Reference._fields})
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{folder}: {REFERENCE} cannot be read: {error}; rebuild the bundle") from None


def verify(pipe: Pipeline, on_step: Callable[[int, int], None] | None = None) -> list[Check]:
    """All checks of a bundle against its reference; the caller decides on `passed`."""
    manifest.check_files(pipe.folder, pipe.manifest, [REFERENCE])
    reference = load_reference(pipe.folder)
    steps = len(reference.timesteps)
    return list(_checks(pipe, reference, lambda done: on_step(done, 2 * steps) if on_step else None))


def _checks(pipe: Pipeline, reference: Reference, tick: Callable[[int], None]) -> Iterator[Check]:
    contract, steps = pipe.manifest, len(reference.timesteps)
    solver = contract.diffusion.sampler.solver
    for name, graph in contract.graphs.items():
        if graph.precision not in TOLERANCES:
            raise BundleError(f"{name} has precision {graph.precision!r}; known: {', '.join(TOLERANCES)}")
    limits = {name: TOLERANCES[graph.precision] for name, graph in contract.graphs.items()}
    betas = contract.diffusion.betas
    wrong = np.flatnonzero(betas != reference.betas) if betas.shape == reference.betas.shape else np.arange(len(betas))
    yield Check("betas that differ", len(wrong), 0, where=f"first at t = {wrong[0]}" if len(wrong) else "")
    times = plan(contract.diffusion, solver, steps)
    yield Check("timesteps that differ", float(np.count_nonzero(times != reference.timesteps)), 0)
    seeds = [int(seed) for seed in reference.seeds]
    first = draw(seeds, len(seeds))(reference.latents[0].shape)
    yield Check("noise, max abs error", float(np.abs(first - reference.latents[0]).max()), NOISE_ATOL)

    middle = reference.timesteps[steps // 2]
    found = fingerprint(pipe.condition, contract.num_classes, middle, contract.graphs["conditioner"].max_batch)
    if found.shape != reference.fingerprint.shape:
        raise BundleError(
            f"{pipe.folder}: {len(found) - 1} classes, its reference has {len(reference.fingerprint) - 1}"
        )
    if reference.images.size and "decoder" not in contract.graphs:
        raise BundleError(f"{pipe.folder}: the decoder is gone, its reference has pictures")
    errors = [relative_error(*pair) for pair in zip(found, reference.fingerprint, strict=True)]
    worst = int(np.nan_to_num(errors, nan=np.inf).argmax())
    yield Check("conditioner, rel-L2", errors[worst], limits["conditioner"].conditioner, where=f"label {worst}")

    yield from _teacher_forced(pipe, reference, limits["denoiser"].prediction, tick)

    latents = yield from _free_run(pipe, reference, limits["denoiser"].latents, tick)
    if latents is not None and "decoder" in contract.graphs:
        yield from _pictures(pipe, reference, latents, limits["decoder"].pictures)


def _free_run(
    pipe: Pipeline, reference: Reference, limit: float, tick: Callable[[int], None]
) -> Generator[Check, None, NDArray[Any] | None]:
    """The whole loop from the same noise, its latents compared after every step; returns the last."""
    steps, drift = len(reference.timesteps), []

    def compare(done: int, _: int, latents: NDArray[Any]) -> None:
        drift.append(relative_error(latents, reference.latents[done]))
        tick(steps + done)

    name, failure, result = "free run, rel-L2", "", None
    try:
        result = pipe.sample(
            [int(label) for label in reference.labels],
            steps=steps,
            guidance=[float(weight) for weight in reference.guidance],
            seed=[int(seed) for seed in reference.seeds],
            output="latents",
            on_step=compare,
        )
    except EngineError as error:
        failure = str(error)
    for step, distance in enumerate(drift):
        yield Check(name, distance, limit, where=f"after step {step + 1} of {steps}")
    if failure:
        yield Check(name, math.nan, limit, where=failure)
    return result


def _teacher_forced(pipe: Pipeline, reference: Reference, limit: float, tick: Callable[[int], None]) -> Iterator[Check]:
    ids = [int(label) for label in reference.labels]
    guided = pipe.table(reference.timesteps, ids, guided=True)
    nulls = pipe.table(reference.timesteps, [pipe.manifest.null_label] * len(ids), guided=False)
    everyone = slice(0, len(ids))
    for step, t in enumerate(reference.timesteps):
        tick(step)
        where = f"step {step + 1} of {len(reference.timesteps)}, t = {t:g}"
        latents = reference.latents[step]
        rows = guided(step, everyone)
        prediction, variance = pipe.denoise(latents, rows, reference.guidance)
        yield Check("prediction, rel-L2", relative_error(prediction, reference.prediction[step]), limit, where=where)
        if variance is not None:
            yield Check("variance, rel-L2", relative_error(variance, reference.variance[step]), limit, where=where)
        if step in (0, len(reference.timesteps) // 2, len(reference.timesteps) - 1):
            for name, alone, expected in (
                ("unguided", rows[:1], reference.conditional),
                ("null label", nulls(step, everyone), reference.null),
            ):
                prediction, _ = pipe.denoise(latents, alone, reference.guidance)
                yield Check(f"{name}, rel-L2", relative_error(prediction, expected[step]), limit, where=where)


def _pictures(pipe: Pipeline, reference: Reference, latents: NDArray[Any], limit: float) -> Iterator[Check]:
    try:
        pictures = images.to_uint8(pipe.decode(latents))
    except EngineError as error:
        yield Check("pictures, PSNR in dB", math.nan, limit, at_least=True, where=str(error))
        return
    ratios = [images.psnr(*pair) for pair in zip(pictures, reference.images, strict=True)]
    worst = int(np.argmin(ratios))
    yield Check("pictures, PSNR in dB", ratios[worst], limit, at_least=True, where=f"sample {worst}")
    flat = [float(picture.astype(np.float64).std()) for picture in pictures]
    yield Check("pictures, contrast", min(flat), 1.0, at_least=True, where=f"sample {int(np.argmin(flat))}")


def table(checks: list[Check]) -> str:
    """What a person reads: each kind of check once, at its first failure or at its worst."""
    lines = [f"{'check':<26} {'worst':>9}  {'limit':>10}"]
    for name in dict.fromkeys(check.name for check in checks):
        same = [check for check in checks if check.name == name]
        worst = next((check for check in same if not check.passed), None) or (min if same[0].at_least else max)(
            same, key=lambda check: check.value
        )
        sign = ">=" if worst.at_least else "<="
        mark = "ok" if worst.passed else "FAILED"
        lines.append(f"{name:<26} {worst.value:>9.3g}  {sign} {worst.limit:<7.3g}  {mark:<6}  {worst.where}".rstrip())
    return "\n".join(lines)
