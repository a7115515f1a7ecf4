"""Replays reference.npz, PyTorch's own answer, with NumPy and the engines alone.

The measuring is replay.py's; here are the tolerances that its figures must keep, and why they are what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from dit_runtime import images
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.errors import BundleError
from dit_runtime.pipeline import Pipeline
from dit_runtime.replay import REFERENCE, Reference, Replay, load_reference, relative_error, replay
from dit_runtime.sampling.noise import draw
from dit_runtime.sampling.solvers import EVALUATIONS, plan

F = TypeVar("F", bound=Any)  # what has a value, and passes or not


@dataclass(frozen=True)
class Tolerances:
    """Largest errors at one precision; relative L2 against the reference's norm unless said otherwise."""

    conditioner: float
    prediction: float  # one teacher-forced evaluation without guidance
    guided: float  # the same with guidance: w eps_y - (w - 1) eps_null has up to 2 w - 1 times the error
    latents: float  # after each step of the free run
    pictures: float  # least PSNR in dB of the uint8 pictures of the free run


TOLERANCES = {
    # fp32 sums in another order: measured 2e-6 to 8e-6 an evaluation; the rest is room for other CPUs' kernels. The
    # free run adds a step's error to the next; one level of 255 everywhere would be 48 dB.
    "fp32": Tolerances(conditioner=1e-4, prediction=1e-4, guided=1e-4, latents=1e-3, pictures=55.0),
    # 8 and 11 bits instead of 24: one rounding is off by up to 4e-3 and 5e-4; measured over 12 blocks 1.2e-2 and 7e-4.
    # A free run also decides between near shapes where the network does: of 40 samples of the demo at guidance 4, 5 end
    # 0.2 to 0.35 away in bf16, and 13 in int8, some in another shape of the class. Unrelated ones are 1.4 away.
    "bf16": Tolerances(conditioner=1e-4, prediction=3e-2, guided=1.5e-1, latents=3e-1, pictures=20.0),
    "fp16": Tolerances(conditioner=1e-4, prediction=5e-3, guided=1.5e-2, latents=3e-2, pictures=35.0),
    # 8 bits for each input and each weight of a product, bf16 around them: measured 6e-3 to 1.2e-2 over 12 blocks.
    "int8": Tolerances(conditioner=1e-4, prediction=4e-2, guided=2e-1, latents=5e-1, pictures=16.0),
    # E4M3 has 4 bits wherever a number lies: inputs and weights are off by up to 6 %, measured 1.9e-2 over 12 blocks.
    "fp8": Tolerances(conditioner=1e-4, prediction=5e-2, guided=2.5e-1, latents=5e-1, pictures=16.0),
}
NOISE_ATOL = 1e-5  # PyTorch's vector code differs from libm's by an ulp of values up to 5


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
        return asdict(self) | {"value": jsonable(self.value), "passed": self.passed}


def jsonable(value: float) -> float | str:
    """JSON knows no NaN and no ∞."""
    return value if math.isfinite(value) else str(value)


def verify(pipe: Pipeline, on_step: Callable[[int, int], None] | None = None) -> list[Check]:
    """All checks of a bundle against its reference; the caller decides on `passed`."""
    manifest.check_files(pipe.folder, pipe.manifest, [REFERENCE])
    reference = load_reference(pipe.folder)
    tolerances(pipe.manifest)  # before the long work
    return judge(pipe.manifest, reference, replay(pipe, reference, on_step))


def tolerances(contract: Manifest) -> dict[str, Tolerances]:
    """Each graph's, by its precision."""
    for name, graph in contract.graphs.items():
        if graph.precision not in TOLERANCES:
            raise BundleError(f"{name} has precision {graph.precision!r}; known: {', '.join(TOLERANCES)}")
    return {name: TOLERANCES[graph.precision] for name, graph in contract.graphs.items()}


def judge(contract: Manifest, reference: Reference, answers: Replay) -> list[Check]:
    """The figures of a replay against the tolerances."""
    return [*sampler(contract, reference), *_engines(contract, reference, answers)]


def sampler(contract: Manifest, reference: Reference) -> Iterator[Check]:
    """Schedule and noise, which no engine has a part in, bit for bit."""
    steps, betas = len(reference.timesteps), contract.diffusion.betas
    wrong = np.flatnonzero(betas != reference.betas) if betas.shape == reference.betas.shape else np.arange(len(betas))
    yield Check("betas that differ", len(wrong), 0, where=f"first at t = {wrong[0]}" if len(wrong) else "")
    solver = contract.diffusion.sampler.solver
    times = plan(contract.diffusion, solver, steps // EVALUATIONS[solver])
    yield Check("timesteps that differ", float(np.count_nonzero(times != reference.timesteps)), 0)
    seeds = [int(seed) for seed in reference.seeds]
    first = draw(seeds, len(seeds))(reference.latents[0].shape)
    yield Check("noise, max abs error", float(np.abs(first - reference.latents[0]).max()), NOISE_ATOL)


def _engines(contract: Manifest, reference: Reference, found: Replay) -> Iterator[Check]:
    limits, steps = tolerances(contract), len(reference.timesteps)
    errors = [relative_error(*pair) for pair in zip(found.fingerprint, reference.fingerprint, strict=True)]
    label = int(np.nan_to_num(errors, nan=np.inf).argmax())
    yield Check("conditioner, rel-L2", errors[label], limits["conditioner"].conditioner, where=f"label {label}")

    denoiser = limits["denoiser"]
    for answer in found.answers:
        limit = denoiser.guided if answer.name in ("prediction", "variance") else denoiser.prediction
        where = f"step {answer.step + 1} of {steps}, t = {reference.timesteps[answer.step]:g}"
        yield Check(f"{answer.name}, rel-L2", answer.error, limit, where=where)

    name = "free run, rel-L2"
    for step, latents in enumerate(found.latents):
        error = relative_error(latents, reference.latents[step + 1])
        yield Check(name, error, denoiser.latents, where=f"after step {step + 1} of {steps}")
    if "latents" in found.failures:
        yield Check(name, math.nan, denoiser.latents, where=found.failures["latents"])
    elif "decoder" in contract.graphs:
        yield from _pictures(reference, found, min(denoiser.pictures, limits["decoder"].pictures))


def _pictures(reference: Reference, found: Replay, limit: float) -> Iterator[Check]:
    if found.pictures is None:
        yield Check("pictures, PSNR in dB", math.nan, limit, at_least=True, where=found.failures["pictures"])
        return
    ratios = [images.psnr(*pair) for pair in zip(found.pictures, reference.images, strict=True)]
    least = int(np.argmin(ratios))
    yield Check("pictures, PSNR in dB", ratios[least], limit, at_least=True, where=f"sample {least}")
    flat = [float(picture.astype(np.float64).std()) for picture in found.pictures]
    yield Check("pictures, contrast", min(flat), 1.0, at_least=True, where=f"sample {int(np.argmin(flat))}")


def worst(figures: Sequence[F], kind: str = "name") -> list[F]:
    """Each kind of check, or of what else has a value and passes or not, once: at its first failure or its worst."""
    found: dict[object, list[F]] = {}
    for figure in figures:
        found.setdefault(getattr(figure, kind), []).append(figure)
    return [
        next((figure for figure in same if not figure.passed), None)
        or (min if same[0].at_least else max)(same, key=lambda figure: figure.value)
        for same in found.values()
    ]


def summary(proof: str, checks: Sequence[Check]) -> dict[str, Any]:
    """What the manifest keeps of them, beside what the build's proof said."""
    found = {check.name: jsonable(check.value) for check in worst(checks)}
    return {"proof": proof, "passed": all(check.passed for check in checks), "worst": found}


def table(checks: Sequence[Check]) -> str:
    """What a person reads."""
    lines = [f"{'check':<26} {'worst':>9}  {'limit':>10}"]
    for check in worst(checks):
        sign, mark = ">=" if check.at_least else "<=", "ok" if check.passed else "FAILED"
        line = f"{check.name:<26} {check.value:>9.3g}  {sign} {check.limit:<7.3g}  {mark:<6}  {check.where}"
        lines.append(line.rstrip())
    return "\n".join(lines)
