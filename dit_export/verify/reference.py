"""PyTorch's own answer: one sampling run in fp32, written into the bundle as reference.npz (8 MB, or four steps).

Of large videos it holds one sample, and some of its frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dit_export.graph.oracle import Oracle
from dit_export.networks import Network, fixtures, rules
from dit_export.networks.codec import Decoder
from dit_export.networks.encoding import Encoder
from dit_export.passes.stages import Pack
from dit_runtime import images
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.conditions.condition import Rows
from dit_runtime.errors import UsageError
from dit_runtime.sampling.noise import Noise
from dit_runtime.sampling.process import Process
from dit_runtime.sampling.solvers import EVALUATIONS, plan, solve
from dit_runtime.verify.reference import ARRAYS, FINGERPRINT_SEED, FINGERPRINTS, REFERENCE, Reference, fingerprinted

SEEDS = (0, 1)
GUIDANCE = (4.0, 1.5)  # what pictures are made with, and what FID is measured with
MAX_STEPS = 10
MAX_BYTES = 7_500_000  # of steps and pictures; the fingerprint, the schedule and the conditions are extra
LEAST_STEPS = 4  # fewer are no run: larger pictures take more bytes, of 1024 px 17 MB
MOST_BYTES = 64_000_000  # of so many steps of all samples; where they take more, there is one sample
FRAMES_BYTES = 32_000_000  # of the pictures; of a video that takes more, some frames stand for it
MAX_ROWS = 16  # of conditions that PyTorch evaluates in one call

DIVISORS = "divisors."  # begins the names of their arrays in reference.npz
Divisors = Mapping[str, NDArray[np.float32]]  # by pack: what smoothing divided its tensors by, (K, D)


def make_reference(
    network: Network,
    decoder: Decoder | None,
    process: Process,
    oracle: Oracle,
    packs: Sequence[Pack],
    divisors: Divisors,
    on_step: Callable[[int, int], None],
    most: int = MAX_STEPS,
    encoder: Encoder | None = None,
) -> Reference:
    """Run the bundle's default solver with PyTorch as network and as source of noise, for up to `most` evaluations.

    `packs` are the tensors that the step stage reads from other stages, in the order of its reads.
    """
    solver, shape = process.sampler.solver, network.state.shape
    steps = step_count(shape, process, decoder.pixels if decoder is not None else 0, most)
    timesteps = plan(process, solver, steps)
    evaluations = len(timesteps)
    seeds = SEEDS[: sample_count(shape)]
    condition, null = fixtures.conditions(network, len(seeds)), fixtures.null(network)
    if network.guidance_port:
        weights = condition[network.guidance_port]
    else:
        weights = np.array(GUIDANCE if network.mixes_guidance else [1.0] * len(SEEDS), np.float32)[: len(seeds)]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def draw(_: tuple[int, ...]) -> NDArray[np.float32]:
        rows = [torch.randn(1, *shape, generator=generator) for generator in generators]
        return np.asarray(torch.cat(rows).numpy())

    run = solve(process, solver, steps, draw(()), draw)
    states, guided, answers = [], [], []
    state, t = next(run)
    for step in range(evaluations):
        x = state.astype(np.float32)
        answer = evaluate(network, x, np.full(len(seeds), t, np.float32), condition, null)
        mixed = guide(network, answer.conditional, answer.null, weights)
        states.append(x)
        guided.append(mixed)
        answers.append(answer)
        on_step(step + 1, evaluations)
        try:
            state, t = run.send((mixed, answer.variance if network.learned_variance else None))
        except StopIteration as end:
            state = end.value
    states.append(state.astype(np.float32))

    pictures, frames = np.empty(0, np.uint8), np.empty(0, np.int64)
    if decoder is not None:
        with torch.no_grad():
            decoded = [decoder(torch.from_numpy(latents[None])) for latents in states[-1]]
        pictures = images.to_uint8(torch.cat(decoded).numpy())
        frames = choose_frames(pictures)
    reference = Reference(
        betas=process.betas,
        timesteps=timesteps,
        seeds=np.array(seeds, np.int64),
        guidance=weights,
        latents=np.stack(states),
        prediction=np.stack(guided),
        conditional=np.stack([answer.conditional for answer in answers]),
        null=np.stack([answer.null for answer in answers]) if condition else np.empty(0, np.float32),
        variance=np.stack([answer.variance for answer in answers]),
        fingerprint=np.empty(0, np.float32),
        images=pictures[:, frames] if frames.size else pictures,
        condition=condition,
        negative=null if condition else None,
        frames=frames,
        encoded=encode(encoder, images.to_unit(pictures)) if encoder is not None else {},
    )
    rows, count = fingerprinted(network.conditions, reference)
    crossing = Crossing(network, oracle, packs, divisors)
    return reference._replace(fingerprint=fingerprint(crossing, rows, count, timesteps[evaluations // 2]))


def encode(encoder: Encoder, pictures: NDArray[np.float32]) -> Rows:
    """Return what PyTorch's encoder gives of each picture, by its outputs' names; (N, 3, H, W) -> (N, *state)."""
    with torch.no_grad():
        rows = [encoder(torch.from_numpy(picture[None])) for picture in pictures]
    return {name: torch.cat(parts).numpy() for name, parts in zip(encoder.gives, zip(*rows, strict=True), strict=True)}


def step_count(shape: Sequence[int], process: Process, pixels: int, longest: int = MAX_STEPS) -> int:
    """Return as many steps as fit the size and the solver's spacing; `pixels` is the side of a cell in the images."""
    samples = sample_count(shape)
    bytes_a_step = samples * math.prod(shape) * 4 * 5
    pictures = samples * 3 * pixels**2 * math.prod(shape[1:])
    solver = process.sampler.solver
    fit = (MAX_BYTES - pictures) // bytes_a_step - 1
    most = min(longest, max(LEAST_STEPS, fit)) // EVALUATIONS[solver]
    for steps in range(most, 0, -1):
        try:
            plan(process, solver, steps)
        except UsageError:
            continue
        return steps
    raise UsageError(f"{solver} has no run of up to {longest} steps with this schedule")


def sample_count(shape: Sequence[int]) -> int:
    """Return how many samples the run has: one where several take too many bytes."""
    return len(SEEDS) if len(SEEDS) * math.prod(shape) * 4 * 5 * (LEAST_STEPS + 1) <= MOST_BYTES else 1


def choose_frames(pictures: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the frames of videos that are kept, spread evenly from the first to the last; empty: all, or no videos."""
    frames = pictures.shape[1] if pictures.ndim == 5 else 0
    most = max(2, FRAMES_BYTES // max(1, pictures.nbytes // max(1, frames)))
    return np.rint(np.linspace(0, frames - 1, most)).astype(np.int64) if frames > most else np.empty(0, np.int64)


class Evaluation(NamedTuple):
    """Hold what the network gives for B rows; (B, C, ...) each."""

    conditional: NDArray[np.float32]
    null: NDArray[np.float32]  # with what guidance leads away from
    variance: NDArray[np.float32]  # (B, 0, ...) where it is not learned


def evaluate(
    network: Network,
    state: NDArray[np.float32],
    timesteps: NDArray[np.float32],
    condition: Rows,
    null: Rows,
) -> Evaluation:
    """Evaluate PyTorch on B rows with their conditions and, in the same call, with `null`, B rows or one."""
    rows = len(state)
    inputs = {network.state.name: state, network.time.name: timesteps, **condition}
    if null:
        inputs = {name: np.concatenate([part, part]) for name, part in inputs.items()}
        inputs |= {n: np.concatenate([own, np.broadcast_to(null[n], own.shape)]) for n, own in condition.items()}
    with torch.no_grad():
        out = network.module(**{name: torch.from_numpy(part) for name, part in inputs.items()}).numpy()
    channels = network.state.shape[0]
    first, last = out[:rows], out[-rows:]
    return Evaluation(first[:, :channels], last[:, :channels], first[:, channels:])


def guide(
    network: Network, conditional: NDArray[np.float32], null: NDArray[np.float32], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return what the network's rule makes of the guided channels, and the rest of the conditional prediction."""
    if not network.mixes_guidance:
        return conditional
    part = slice(0, network.guided_channels)
    pair = [torch.from_numpy(prediction[:, part]) for prediction in (conditional, null)]
    with torch.no_grad():
        guided = rules.rule(network)(*pair, torch.from_numpy(weights).reshape(-1, *[1] * (conditional.ndim - 1)))
    result = conditional.copy()
    result[:, part] = guided.numpy()
    return result


class Crossing:
    """PyTorch's values of the tensors that cross into the loop, as a bundle's stages make them."""

    def __init__(self, network: Network, oracle: Oracle, packs: Sequence[Pack], divisors: Divisors) -> None:
        self._network, self._oracle, self._packs, self._divisors = network, oracle, packs, divisors

    def __call__(self, t: float, condition: Rows, rows: int) -> Rows:
        """Return by pack name [rows, K, D], or the one tensor as it is, in the order of the packs."""
        names = [name for pack in self._packs for name in pack.tensors]
        inputs = {self._network.time.name: np.full(rows, t, np.float32), **condition}
        values = self._oracle(names, **{name: torch.from_numpy(part) for name, part in inputs.items()})
        result = {}
        for pack in self._packs:
            parts = [values[name].numpy() for name in pack.tensors]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            result[pack.name] = whole / self._divisors.get(pack.name, np.float32(1))
        return result


def fingerprint(crossing: Crossing, conditions: Rows, count: int, timestep: float) -> NDArray[np.float32]:
    """Project what crosses at one timestep onto a few seeded directions, as the runtime does; (F, 4)."""
    parts: list[NDArray[Any]] = []
    directions: NDArray[Any] = np.empty(0)
    for first in range(0, count, MAX_ROWS):
        some = {name: rows[first : first + MAX_ROWS] for name, rows in conditions.items()}
        rows = min(MAX_ROWS, count - first)
        values = crossing(timestep, some, rows).values()
        vectors = np.concatenate([np.empty((rows, 0)), *(part.reshape(rows, -1) for part in values)], axis=1)
        if not first:
            width = vectors.shape[1]
            directions = Noise(FINGERPRINT_SEED).normal((width, FINGERPRINTS)) / math.sqrt(max(1, width))
        parts.append(vectors @ directions)
    return np.concatenate(parts).astype(np.float32)


def save_reference(folder: Path, reference: Reference, packs: Sequence[Pack], divisors: Divisors) -> None:
    """Write reference.npz; a pack's divisors are stored once for each of its tensors."""
    arrays = {name: getattr(reference, name) for name in ARRAYS}
    arrays |= {"frames": reference.frames} if reference.frames.size else {}
    arrays |= {f"encoded.{name}": rows for name, rows in reference.encoded.items()}
    for prefix, condition in (("condition", reference.condition), ("null", reference.negative or {})):
        for name, rows in condition.items():
            arrays[f"{prefix}.{name}"] = _narrowed(rows)
    for pack in packs:
        if pack.name in divisors:
            first = np.cumsum((0, *pack.sizes[:-1]))
            arrays[DIVISORS + pack.name] = divisors[pack.name][first]
    np.savez(folder / REFERENCE, **arrays)


def _narrowed(rows: NDArray[Any]) -> NDArray[Any]:
    """Return float rows as float16 where that is exact; fixtures are, a network's constants need not be."""
    with np.errstate(over="ignore"):
        narrow = rows.astype(np.float16)
    return narrow if rows.dtype == np.float32 and np.array_equal(narrow.astype(np.float32), rows) else rows


def load_divisors(folder: Path, contract: Manifest, packs: Sequence[Pack]) -> Divisors:
    name = contract.own(REFERENCE)
    with manifest.checking(folder, contract, [name]):
        arrays = manifest.read_arrays(folder, name)
    stored = {pack: arrays[DIVISORS + pack.name] for pack in packs if DIVISORS + pack.name in arrays}
    return {pack.name: np.repeat(rows, pack.sizes, axis=0) for pack, rows in stored.items()}
