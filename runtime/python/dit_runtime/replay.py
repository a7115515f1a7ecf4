"""Asks the engines what PyTorch was asked in reference.npz, and measures how far their answers are from its own.

The reference holds one sampling run in fp32. Per step the engine is asked the same question as PyTorch was
(teacher-forced: its error is the engine's own), then it runs freely from the same noise to the same pictures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime import images
from dit_runtime.bundle import manifest
from dit_runtime.captions import examples
from dit_runtime.errors import BundleError
from dit_runtime.pipeline import EngineError, Pipeline
from dit_runtime.sampling.noise import Noise
from dit_runtime.sampling.solvers import EVALUATIONS

REFERENCE = "reference.npz"
FINGERPRINTS = 4  # numbers kept of each label's conditioning
FINGERPRINT_SEED = 0


class Reference(NamedTuple):
    """S steps (evaluations of the network) of a run of B samples; every array is float32 unless said otherwise."""

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


class Answer(NamedTuple):
    """One output of the denoiser beside PyTorch's."""

    name: str  # prediction, variance, unguided or null label
    step: int  # from 0
    error: float  # relative L2
    cosine: float


class Replay(NamedTuple):
    """What the engines answered; where one broke down, `failures` says how, and what it owes is missing."""

    fingerprint: NDArray[np.float32]  # as the reference's
    answers: list[Answer]
    latents: list[NDArray[Any]]  # after each step of the free run
    pictures: NDArray[np.uint8] | None  # of the free run
    decoded: NDArray[np.uint8] | None  # of the reference's last latents, where that was asked for
    failures: Mapping[str, str]  # by the field it concerns
    seconds: list[float]  # of each guided evaluation


def relative_error(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """||value − reference|| / ||reference||; NaN and inf stay what they are."""
    difference = value.astype(np.float64) - reference
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(reference.astype(np.float64))), 1e-30))


def cosine(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """⟨value, reference⟩ / (||value|| ||reference||); 0 where one of them is zero."""
    first, second = value.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    return float(first @ second / max(float(np.linalg.norm(first) * np.linalg.norm(second)), 1e-30))


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


def hoisted(pipe: Pipeline) -> Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[Any]]:
    """Everything that leaves the loop, by timestep and label, or example caption: [N, K, D], or [N, K + M, D]."""
    shape = pipe.manifest.caption_shape

    def vectors(timesteps: NDArray[np.float32], numbers: NDArray[np.int64]) -> NDArray[Any]:
        rows = pipe.condition(timesteps, numbers)
        if shape is None:
            return rows
        return np.concatenate([rows, pipe.context(examples(numbers, *shape)).vectors], axis=1)

    return vectors


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


def replay(
    pipe: Pipeline, reference: Reference, on_step: Callable[[int, int], None] | None = None, thorough: bool = False
) -> Replay:
    """All answers; a thorough replay asks without guidance at every step, not at three, and the decoder by itself."""
    contract, steps = pipe.manifest, len(reference.timesteps)
    solver = contract.diffusion.sampler.solver

    def tick(done: int) -> None:
        if on_step is not None:
            on_step(done, 2 * steps)

    middle = reference.timesteps[steps // 2]
    found = fingerprint(hoisted(pipe), contract.num_classes, middle, contract.graphs["conditioner"].max_batch)
    if found.shape != reference.fingerprint.shape:
        raise BundleError(
            f"{pipe.folder}: {len(found) - 1} classes, its reference has {len(reference.fingerprint) - 1}"
        )
    if reference.images.size and "decoder" not in contract.graphs:
        raise BundleError(f"{pipe.folder}: the decoder is gone, its reference has pictures")
    alone = range(steps) if thorough else {0, steps // 2, steps - 1}
    seconds: list[float] = []
    answers = list(_teacher_forced(pipe, reference, alone, tick, seconds))

    latents: list[NDArray[Any]] = []

    def keep(done: int, _: int, x: NDArray[Any]) -> None:
        latents.append(x.astype(np.float32))
        tick(steps + done)

    failures: dict[str, str] = {}
    try:
        pipe.sample(
            [int(label) for label in reference.labels],
            steps=steps // EVALUATIONS[solver],
            guidance=[float(weight) for weight in reference.guidance],
            seed=[int(seed) for seed in reference.seeds],
            output="latents",
            on_step=keep,
        )
    except EngineError as error:
        failures["latents"] = str(error)
    pictures: dict[str, NDArray[np.uint8] | None] = {"pictures": None, "decoded": None}
    if "decoder" in contract.graphs:
        last = {} if "latents" in failures else {"pictures": latents[-1]}
        for name, x in (last | ({"decoded": reference.latents[-1]} if thorough else {})).items():
            try:
                pictures[name] = images.to_uint8(pipe.decode(x))
            except EngineError as error:
                failures[name] = str(error)
    return Replay(found, answers, latents, failures=failures, seconds=seconds, **pictures)


def _teacher_forced(
    pipe: Pipeline, reference: Reference, alone: Collection[int], tick: Callable[[int], None], seconds: list[float]
) -> Iterator[Answer]:
    ids = [int(label) for label in reference.labels]
    guided = pipe.table(reference.timesteps, ids, guided=True)
    nulls = pipe.table(reference.timesteps, [pipe.manifest.null_label] * len(ids), guided=False)
    everyone = slice(0, len(ids))
    context = pipe.examples(ids, guided=True)(everyone)
    own = pipe.examples(ids, guided=False)(everyone)
    null = pipe.examples([pipe.manifest.null_label] * len(ids), guided=False)(everyone)

    def answer(name: str, step: int, got: NDArray[Any], expected: NDArray[Any]) -> Answer:
        return Answer(name, step, relative_error(got, expected), cosine(got, expected))

    for step in range(len(reference.timesteps)):
        tick(step)
        latents = reference.latents[step]
        rows = guided(step, everyone)
        began = time.perf_counter()
        prediction, variance = pipe.denoise(latents, rows, reference.guidance, context)
        seconds.append(time.perf_counter() - began)
        yield answer("prediction", step, prediction, reference.prediction[step])
        if variance is not None:
            yield answer("variance", step, variance, reference.variance[step])
        if step in alone:
            for name, told, read, expected in (
                ("unguided", rows[:1], own, reference.conditional),
                ("null label", nulls(step, everyone), null, reference.null),
            ):
                prediction, _ = pipe.denoise(latents, told, reference.guidance, read)
                yield answer(name, step, prediction, expected[step])
