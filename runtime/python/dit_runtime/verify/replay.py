"""Run the engines on the inputs of reference.npz and compare.

The reference holds one sampling run in fp32. In each step the engine gets the input that
PyTorch had, so its error is its own. Then it runs freely, from the same noise to the pictures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime import backends, images
from dit_runtime.bundle.manifest import Manifest, Stage
from dit_runtime.conditions.condition import Rows
from dit_runtime.conditions.memo import StepInputs, side_by_side
from dit_runtime.engines import Engines
from dit_runtime.errors import BundleError, EngineError
from dit_runtime.pipeline import Pipeline
from dit_runtime.request import Request
from dit_runtime.sampling.solvers import EVALUATIONS
from dit_runtime.verify.reference import Reference, fingerprint, fingerprinted


class Answer(NamedTuple):
    """One output of the step stage beside PyTorch's."""

    name: str  # prediction, variance, unguided or null condition
    step: int  # from 0
    error: float  # relative L2
    cosine: float


class Invariance(NamedTuple):
    """The difference between a row that runs alone and the same row in a batch of other rows."""

    stage: str
    difference: float  # largest, absolute; NaN where the stage failed
    on_cpu: bool
    where: str


class Replay(NamedTuple):
    """The engines' answers; where one broke down, `failures` says how; the missing outputs are None or absent."""

    fingerprint: NDArray[np.float32]  # as the reference's
    answers: list[Answer]
    latents: list[NDArray[Any]]  # after each step of the free run
    pictures: NDArray[np.uint8] | None  # of the free run
    decoded: NDArray[np.uint8] | None  # of the reference's last latents, where that was asked for
    failures: Mapping[str, str]  # by the field it concerns
    seconds: list[float]  # of each guided evaluation
    # Of the reference's pictures, by the encoder's outputs.
    encoded: Mapping[str, NDArray[np.float32]] = MappingProxyType({})
    invariance: Sequence[Invariance] = ()  # of the step stage and of the decoder


def relative_error(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """||value − reference|| / ||reference||; NaN and inf stay what they are."""
    difference = value.astype(np.float64) - reference
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(reference.astype(np.float64))), 1e-30))


def latents_psnr(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """Return the PSNR in dB of latents, whose peak is the reference's own range."""
    return images.psnr(value, reference, peak=float(np.ptp(reference)) or 1.0)


def cosine(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """⟨value, reference⟩ / (||value|| ||reference||); 0 where one of them is zero."""
    first, second = value.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    return float(first @ second / max(float(np.linalg.norm(first) * np.linalg.norm(second)), 1e-30))


def replay(
    pipe: Pipeline, reference: Reference, on_step: Callable[[int, int], None] | None = None, thorough: bool = False
) -> Replay:
    """Return all answers; a thorough replay asks unguided at every step, and decodes PyTorch's latents too."""
    contract, steps = pipe.manifest, len(reference.timesteps)

    def tick(done: int) -> None:
        if on_step is not None:
            on_step(done, 2 * steps)

    middle = float(reference.timesteps[steps // 2])
    prints = fingerprint(pipe.engines, *fingerprinted(contract.conditions, reference), middle)
    if prints.shape != reference.fingerprint.shape:
        raise BundleError(f"{pipe.folder}: {len(prints)} conditions, its reference has {len(reference.fingerprint)}")
    if reference.images.size and contract.end is None:
        raise BundleError(f"{pipe.folder}: the decoder is gone, its reference has pictures")
    alone = range(steps) if thorough else {0, steps // 2, steps - 1}
    seconds: list[float] = []
    answers = list(_teacher_forced(pipe, reference, alone, tick, seconds))
    invariance = [_step_invariance(pipe, reference)]

    latents: list[NDArray[Any]] = []
    failures: dict[str, str] = {}
    try:
        run = pipe.run(_request(contract, reference))
        more = True
        while more:
            more = run.step()
            latents.append(run.state.astype(np.float32))
            tick(steps + run.done)
    except EngineError as error:
        failures["latents"] = str(error)
    encoded: Rows = {}
    if contract.start is not None:
        try:
            encoded = pipe.engines.encode_pictures(images.to_unit(reference.images))
        except EngineError as error:
            failures["encoded"] = str(error)
    pictures: dict[str, NDArray[np.uint8] | None] = {"pictures": None, "decoded": None}
    if contract.end is not None:
        invariance.append(_end_invariance(pipe.engines, contract.end, reference))
        last = {} if "latents" in failures else {"pictures": latents[-1]}
        for name, x in (last | ({"decoded": reference.latents[-1]} if thorough else {})).items():
            try:
                pictures[name] = reference.shown(images.to_uint8(pipe.engines.decode(x)))
            except EngineError as error:
                failures[name] = str(error)
    return Replay(
        prints,
        answers,
        latents,
        failures=failures,
        seconds=seconds,
        encoded=encoded,
        invariance=tuple(invariance),
        **pictures,
    )


def _request(contract: Manifest, reference: Reference) -> Request:
    """Return the reference's request, with the manifest's constants for what guidance leads away from.

    A network that is guided by itself gets the reference's weights as every request does.
    """
    solver, own = contract.process.sampler.solver, dict(reference.condition)
    own.pop(contract.guidance.port, None)
    negative = {
        port.name: reference.negative[port.name]
        for port in contract.conditions
        if reference.negative and contract.mixes_guidance and (port.masks or port.name) not in contract.null
    }
    return Request(
        condition=own,
        negative=negative,
        steps=len(reference.timesteps) // EVALUATIONS[solver],
        guidance=[float(weight) for weight in reference.guidance],
        seed=[int(seed) for seed in reference.seeds],
        output="latents",
    )


def _teacher_forced(
    pipe: Pipeline, reference: Reference, alone: Collection[int], tick: Callable[[int], None], seconds: list[float]
) -> Iterator[Answer]:
    own, count = reference.condition, len(reference.guidance)
    away = reference.negative
    guided = away is not None and pipe.manifest.mixes_guidance

    def inputs(condition: Rows, negative: Rows | None = None) -> StepInputs:
        return pipe.engines.inputs(reference.timesteps, condition, negative, reference.guidance)

    both = inputs(own, away if guided else None)
    others = {"unguided": (inputs(own), reference.conditional)} if guided else {}
    if away is not None and reference.null.size:
        repeated = {name: np.repeat(rows, count, axis=0) for name, rows in away.items()}
        others["null condition"] = inputs(repeated), reference.null

    def answer(name: str, step: int, got: NDArray[Any], expected: NDArray[Any]) -> Answer:
        return Answer(name, step, relative_error(got, expected), cosine(got, expected))

    for step in range(len(reference.timesteps)):
        tick(step)
        latents = reference.latents[step]
        both(step, slice(0, pipe.manifest.step.max_batch))  # so that what is timed below is the loop alone
        began = time.perf_counter()
        prediction, variance = pipe.engines.denoise(latents, both, step)
        seconds.append(time.perf_counter() - began)
        yield answer("prediction", step, prediction, reference.prediction[step])
        if variance is not None:
            yield answer("variance", step, variance, reference.variance[step])
        if step in alone:
            for name, (rows, expected) in others.items():
                prediction, _ = pipe.engines.denoise(latents, rows, step)
                yield answer(name, step, prediction, expected[step])


def _step_invariance(pipe: Pipeline, reference: Reference) -> Invariance:
    """Ask for a row alone and between two others, each with its own timestep, condition and guidance.

    What the row reads from the stages before the loop is made for it alone, too.
    """
    engines, contract, stage = pipe.engines, pipe.manifest, pipe.manifest.step
    last, samples = len(reference.timesteps) - 1, len(reference.seeds)
    places = [(0, 0), (1 % samples, (last + 1) // 2), (0, last)][: stage.max_batch]  # sample and step
    times = reference.timesteps[[step for _, step in places]]
    states = np.stack([reference.latents[step, sample] for sample, step in places])
    row = len(places) // 2
    sample = places[row][0]

    def inputs(timesteps: NDArray[Any], some: slice) -> StepInputs:
        own = {name: rows[some] for name, rows in reference.condition.items()}
        away = reference.negative if contract.mixes_guidance else None
        return engines.inputs(timesteps, own, away, reference.guidance[some])

    whole = inputs(times, slice(None))
    mixed = side_by_side([whole(step, slice(own, own + 1)) for step, (own, _) in enumerate(places)])
    alone = inputs(times[row : row + 1], slice(sample, sample + 1))(0, slice(0, 1))
    batch = engines.run(stage, {contract.state.name: states, **mixed})
    single = engines.run(stage, {contract.state.name: states[row : row + 1], **alone})
    difference = float(np.max([np.abs(batch[name][row] - single[name][0]).max() for name in single]))
    where = f"sample {sample} at t = {times[row]:g} in a batch of {len(places)}"
    return Invariance(stage.name, difference, _on_cpu(engines, stage), where)


def _end_invariance(engines: Engines, stage: Stage, reference: Reference) -> Invariance:
    """Decode a sample of the reference alone and in a batch with the others."""
    latents = reference.latents[-1][: stage.max_batch]
    sample = len(latents) // 2
    try:
        batch, single = engines.decode(latents), engines.decode(latents[sample : sample + 1])
        difference = float(np.abs(batch[sample] - single[0]).max())
        where = f"sample {sample} in a batch of {len(latents)}"
    except EngineError as error:
        difference, where = math.nan, str(error)
    return Invariance(stage.name, difference, _on_cpu(engines, stage), where)


def _on_cpu(engines: Engines, stage: Stage) -> bool:
    return stage.backend in backends.CPU and engines.options.provider in (None, "cpu")
