"""The tolerances that a replay's figures must keep, and why they are what they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dit_runtime import images
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest, Stage
from dit_runtime.bundle.records import Size
from dit_runtime.errors import BundleError
from dit_runtime.facts import FACTS
from dit_runtime.pipeline import Pipeline
from dit_runtime.sampling.noise import draw
from dit_runtime.sampling.solvers import EVALUATIONS, plan
from dit_runtime.verify import prompts
from dit_runtime.verify.figures import Figure
from dit_runtime.verify.reference import REFERENCE, Reference, load_reference
from dit_runtime.verify.replay import Replay, latents_psnr, relative_error, replay


@dataclass(frozen=True)
class Tolerances:
    """Largest errors at one precision; relative L2 against the reference's norm unless said otherwise."""

    conditioner: float  # of what the stages before the loop give
    prediction: float  # one teacher-forced evaluation without guidance
    guided: float  # the same with guidance: w eps_y - (w - 1) eps_null has up to 2 w - 1 times the error
    latents: float  # after each step of the free run
    encoded: float  # least PSNR in dB of the encoder's outputs, by their own range
    pictures: float  # least PSNR in dB of the uint8 pictures of the free run
    nearest: bool  # the nearest sample of the free run must keep the limits; else every sample must


# fp32 sums in another order: measured 2e-6 to 8e-6 an evaluation; the rest is room for other CPUs' kernels. The free
# run adds a step's error to the next; one level of 255 everywhere would be 48 dB.
# bf16 and fp16 have 8 and 11 bits instead of 24: one rounding is off by up to 4e-3 and 5e-4; measured over 12 blocks
# 1.2e-2 and 7e-4.
# A free run decides between shapes where the network does, and rounding may turn a decision. Measured on 400 samples of
# the demo in int8 (0.012 off an evaluation): 7.7 % end more than 0.5 away at guidance 4, and 1.3 % at 1.5. The farthest
# end as far away (1.4) as unrelated samples. With 8 seeds of calibration the demo's own sample at guidance 4 ends 0.4
# to 0.85 away with the same errors an evaluation, and that of the twin in fp16 goes from 0.002 to 0.08 within five
# steps. No limit tells such a sample from a wrong one, so in all but fp32 the nearest sample counts: an error of the
# loop moves all samples, a decision only its own. Of two unrelated samples of one class 1 % are less than 0.5 apart.
# Each evaluation of each sample keeps the limits of teacher forcing.
# The gate protects the pictures of a run and their distribution. In int8 and fp8 the limits of a step follow from both
# (docs/gate.md has the tables). Pictures: over 89 runs of 29 random networks, a run at guidance 1.5 ended at most 6.0
# times its largest unguided error of a step away, so the run's 0.5 allows 0.083 a step. Distribution: the demo's is
# fp32's at 0.059 a step, and its Fréchet distance 12 % larger at 0.073. The smaller one counts, 0.06. Guidance 4
# multiplied a step's error by 2.8 in the median and by up to 3.5 in 90 % of the runs, not by 2 w - 1: so 0.2 guided.
# As built, int8 has 6e-3 to 1.2e-2 over 12 blocks and fp8 (E4M3, 4 bits wherever a number lies) 1.9e-2.
TOLERANCES = {precision: Tolerances(**limits) for precision, limits in FACTS["tolerances"].items()}
CONTRAST: float = FACTS["contrast"]  # least standard deviation of a picture's levels of 255
INVARIANCE = "a row in a batch and alone, max abs difference"
NOISE_ATOL: float = FACTS["noise_atol"]  # PyTorch's vector code differs from libm's by an ulp of values up to 5


def verify(pipe: Pipeline, on_step: Callable[[int, int], None] | None = None) -> list[Figure]:
    """Return all figures of a bundle against its references; the caller decides on `passed`.

    The stages of sizes other than the pipeline's own have the size before their name. Its engines are closed before
    those of another size open.
    """
    figures = _verify_size(pipe, on_step, with_prompts=True)
    for other in pipe.manifest.sizes:
        pipe.engines.close()
        sized = _verify_size(pipe.at(other.size), on_step, with_prompts=False)
        figures += [replace(figure, stage=_prefix(other) + figure.stage) for figure in sized]
    return figures


def _prefix(size: Size) -> str:
    return f"{size.size}: "


def by_size(contract: Manifest, figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    """Return the figures of each size, by the stages' own names."""
    own: dict[str, list[Figure]] = {size.size: [] for size in contract.each_size}
    for figure in figures:
        other = next((size for size in contract.sizes if figure.stage.startswith(_prefix(size))), None)
        name = contract.size if other is None else other.size
        stage = figure.stage if other is None else figure.stage.removeprefix(_prefix(other))
        own[name].append(replace(figure, stage=stage))
    return own


def _verify_size(pipe: Pipeline, on_step: Callable[[int, int], None] | None, with_prompts: bool) -> list[Figure]:
    with manifest.checking(pipe.folder, pipe.manifest, [pipe.manifest.own(REFERENCE)]):
        reference = load_reference(pipe.folder, pipe.manifest)
    tolerances(pipe.manifest)  # before the long work
    figures = list(prompt_figures(pipe)) if with_prompts else []
    return figures + judge(pipe.manifest, reference, replay(pipe, reference, on_step))


def prompt_figures(pipe: Pipeline) -> Iterator[Figure]:
    """Return one figure a port that the prompt stage gives; none where a bundle takes no prompts.

    Its encoders keep to the limit of an evaluation, as they are networks of their own.
    """
    if (stage := pipe.manifest.prompt) is not None:
        limit = TOLERANCES[pipe.manifest.step.precision].prediction
        for name, row, error in prompts.errors(pipe):
            yield Figure(stage.name, f"{name} of ids, fingerprint, rel-L2", error, limit, where=f"prompt {row}")


def tolerances(contract: Manifest) -> dict[str, Tolerances]:
    """Return each stage's, by its precision."""
    for stage in contract.stages:
        if stage.precision not in TOLERANCES:
            raise BundleError(f"{stage.name} has precision {stage.precision!r}; known: {', '.join(TOLERANCES)}")
    return {stage.name: TOLERANCES[stage.precision] for stage in contract.stages}


def judge(contract: Manifest, reference: Reference, answers: Replay) -> list[Figure]:
    """Return the figures of a replay with the limits of the stages' precisions."""
    limits = tolerances(contract)
    step = limits[contract.step.name]
    return [
        *sampler(contract, reference),
        *_before_loop(contract, reference, answers),
        *_encoded(contract, reference, answers),
        *_step(contract, reference, answers, step),
        *_invariance(answers, contract.step),
        *_run(contract, reference, answers, step),
        *(_invariance(answers, contract.end) if contract.end else ()),
    ]


def sampler(contract: Manifest, reference: Reference) -> Iterator[Figure]:
    """Schedule and noise, which no engine has a part in, bit for bit."""
    wrong = _differences(contract.process.betas, reference.betas)
    where = f"first at t = {wrong[0]}" if len(wrong) else ""
    yield Figure("sampler", "betas that differ", len(wrong), 0, where=where)
    solver = contract.process.sampler.solver
    times = plan(contract.process, solver, len(reference.timesteps) // EVALUATIONS[solver])
    yield Figure("sampler", "timesteps that differ", len(_differences(times, reference.timesteps)), 0)
    seeds = [int(seed) for seed in reference.seeds]
    first = draw(seeds, len(seeds))(reference.latents[0].shape)
    yield Figure("sampler", "noise, max abs error", float(np.abs(first - reference.latents[0]).max()), NOISE_ATOL)


def _differences(values: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the places where two arrays differ; all of them where their lengths do."""
    if len(values) != len(reference):
        return np.arange(max(len(values), len(reference)))
    return np.flatnonzero(values != reference)


def _before_loop(contract: Manifest, reference: Reference, answers: Replay) -> Iterator[Figure]:
    """Return one figure for all stages before the loop: a fingerprint has what each of them gives."""
    stages = contract.before_loop
    if not stages:
        return
    limit = max(TOLERANCES[stage.precision].conditioner for stage in stages)
    errors = [relative_error(*pair) for pair in zip(answers.fingerprint, reference.fingerprint, strict=True)]
    row = int(np.nan_to_num(errors, nan=np.inf).argmax())
    where = f"{'label' if contract.classes and len(contract.conditions) == 1 else 'condition'} {row}"
    yield Figure("+".join(stage.name for stage in stages), "fingerprint, rel-L2", errors[row], limit, where=where)


def _encoded(contract: Manifest, reference: Reference, answers: Replay) -> Iterator[Figure]:
    if (stage := contract.start) is None:
        return
    where, limit = answers.failures.get("encoded", ""), TOLERANCES[stage.precision].encoded
    for name, expected in reference.encoded.items():
        ratio = latents_psnr(answers.encoded[name], expected) if name in answers.encoded else math.nan
        yield Figure(stage.name, f"{name} of pictures, PSNR in dB", ratio, limit, at_least=True, where=where)


def _step(contract: Manifest, reference: Reference, answers: Replay, limits: Tolerances) -> Iterator[Figure]:
    steps = len(reference.timesteps)
    for answer in answers.answers:
        limit = limits.guided if answer.name in ("prediction", "variance") else limits.prediction
        where = f"step {answer.step + 1} of {steps}, t = {reference.timesteps[answer.step]:g}"
        metric, step = f"{answer.name}, rel-L2", answer.step + 1
        yield Figure(contract.step.name, metric, answer.error, limit, step=step, where=where)


def _invariance(answers: Replay, stage: Stage) -> Iterator[Figure]:
    """Hold engines on a CPU to the same bits; report what others differ by."""
    for row in answers.invariance:
        if row.stage == stage.name:
            yield Figure(row.stage, INVARIANCE, row.difference, 0 if row.on_cpu else None, where=row.where)


def batch_invariant(contract: Manifest, figures: Iterable[Figure]) -> bool:
    """Return whether a row had the same bits in a batch as alone, in each stage that was measured."""
    stages = {stage.name for stage in contract.stages}
    values = [figure.value for figure in figures if figure.metric == INVARIANCE and figure.stage in stages]
    return bool(values) and not any(values)  # NaN is true


def _run(contract: Manifest, reference: Reference, answers: Replay, limits: Tolerances) -> Iterator[Figure]:
    metric, steps = "latents, rel-L2", len(reference.timesteps)
    for index, latents in enumerate(answers.latents):
        expected, where = reference.latents[index + 1], f"after step {index + 1} of {steps}"
        error = relative_error(latents, expected)
        if limits.nearest:
            errors = [relative_error(*pair) for pair in zip(latents, expected, strict=True)]
            error = float(np.min(errors))  # NaN where one of them is
        yield Figure("run", metric, error, limits.latents, step=index + 1, where=where)
    if "latents" in answers.failures:
        step = len(answers.latents) + 1
        yield Figure("run", metric, math.nan, limits.latents, step=step, where=answers.failures["latents"])
    elif contract.end is not None:
        least = min(limits.pictures, TOLERANCES[contract.end.precision].pictures)
        yield from _pictures(reference, answers, least, limits.nearest)


def _pictures(reference: Reference, answers: Replay, limit: float, nearest: bool) -> Iterator[Figure]:
    metric = "pictures, PSNR in dB"
    if answers.pictures is None:
        yield Figure("run", metric, math.nan, limit, at_least=True, where=answers.failures["pictures"])
        return
    ratios = [images.psnr(*pair) for pair in zip(answers.pictures, reference.images, strict=True)]
    sample = int(np.argmax(ratios) if nearest else np.argmin(ratios))
    yield Figure("run", metric, ratios[sample], limit, at_least=True, where=f"sample {sample}")
    flat = [float(picture.astype(np.float64).std()) for picture in answers.pictures]
    least = int(np.argmin(flat))
    yield Figure("run", "pictures, contrast", flat[least], CONTRAST, at_least=True, where=f"sample {least}")
