"""reference.npz: one sampling run of PyTorch in fp32, and fingerprints of what it hands to the loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest, Port
from dit_runtime.conditions.condition import Rows, fit
from dit_runtime.conditions.memo import open_sources
from dit_runtime.engines import Engines
from dit_runtime.errors import BundleError, UsageError
from dit_runtime.facts import CONSTANTS, LIMITS
from dit_runtime.sampling.noise import Noise
from dit_runtime.sampling.solvers import EVALUATIONS

REFERENCE = "reference.npz"
FINGERPRINTS: int = CONSTANTS["fingerprints"]  # numbers of each condition
FINGERPRINT_SEED: int = CONSTANTS["fingerprint_seed"]


class Reference(NamedTuple):
    """S steps (evaluations of the network) of a run of B samples; every array is float32 unless said otherwise."""

    betas: NDArray[np.float64]  # (T,)
    timesteps: NDArray[np.float64]  # (S,)
    seeds: NDArray[np.int64]  # (B,)
    guidance: NDArray[np.float32]  # (B,)
    latents: NDArray[np.float32]  # (S + 1, B, *state): what the network saw at each step, and the result
    prediction: NDArray[np.float32]  # (S, B, *state), guided
    conditional: NDArray[np.float32]  # (S, B, *state), without guidance
    null: NDArray[np.float32]  # (S, B, *state), of what guidance leads away from; empty where there is none
    variance: NDArray[np.float32]  # (S, B, *state), or empty where it is not learned
    fingerprint: NDArray[np.float32]  # (F, FINGERPRINTS) of the conditions at the middle timestep
    images: NDArray[np.uint8]  # (B, H, W, 3), of videos (B, F, H, W, 3), or empty without a decoder
    condition: Rows  # (B, …) by port; "condition.NAME" in the file
    negative: Rows | None  # (1, …) by port, what guidance leads away from; "null.NAME" in the file
    # (B, *state) by output of the encoder, of `images`; "encoded.NAME" in the file
    encoded: Mapping[str, NDArray[np.float32]] = MappingProxyType({})
    frames: NDArray[np.int64] = np.empty(0, np.int64)  # (F,) of the videos, those that `images` has; empty: all

    def shown(self, pictures: NDArray[Any]) -> NDArray[Any]:
        """Return what `images` has of pictures or videos."""
        return pictures[:, self.frames] if self.frames.size else pictures


ARRAYS = tuple(name for name in Reference._fields if name not in ("condition", "negative", "encoded", "frames"))


def load_reference(folder: Path, contract: Manifest) -> Reference:
    name = contract.own(REFERENCE)
    try:
        arrays = {key: _wide(array) for key, array in manifest.read_arrays(folder, name).items()}
    except UsageError as error:
        raise BundleError(f"{error}; rebuild the bundle") from None
    condition = _by_port(arrays, "condition", contract)
    negative = _by_port(arrays, "null", contract)
    gives = [spec.name for spec in contract.start.gives] if contract.start else []
    needed = {*ARRAYS, *(f"condition.{port.name}" for port in contract.conditions), *(f"encoded.{n}" for n in gives)}
    if missing := sorted(needed - arrays.keys()):
        raise BundleError(f"{folder}: {name} lacks {', '.join(missing)}; rebuild the bundle")
    try:
        rows = fit(condition, contract.conditions, "its condition")
        away = fit(negative, contract.conditions, "its null") if negative or contract.mixes_guidance else None
        frames = arrays.get("frames", np.empty(0, np.int64))
        own = {name: arrays[f"encoded.{name}"] for name in gives}
        of_run = {key: arrays[key] for key in ARRAYS}
        reference = Reference(**of_run, condition=rows, negative=away, encoded=own, frames=frames)
        _check_shapes(contract, reference)
    except UsageError as error:
        raise BundleError(f"{folder}: {name} does not fit the manifest: {error}; rebuild the bundle") from None
    return reference


def _check_shapes(contract: Manifest, reference: Reference) -> None:
    """Refuse arrays that are not of the run's steps, its samples and the manifest's shapes."""
    steps, batch = reference.timesteps.size, reference.seeds.size
    for what, count, most in (
        ("timesteps", steps, LIMITS["evaluations"]),
        ("seeds", batch, LIMITS["samples"]),
    ):
        if not 1 <= count <= most:
            raise UsageError(f"it has {count} {what}, expected 1 to {most}")
    solver = contract.process.sampler.solver
    if steps % EVALUATIONS[solver]:
        raise UsageError(f"timesteps has {steps} numbers, expected {EVALUATIONS[solver]} a step of {solver}")
    each = (batch, *contract.state.shape)
    shapes: dict[str, tuple[int, ...]] = {
        "betas": (reference.betas.size,),
        "timesteps": (steps,),
        "seeds": (batch,),
        "guidance": (batch,),
        "latents": (steps + 1, *each),
        "prediction": (steps, *each),
        "conditional": (steps, *each),
        "fingerprint": (fingerprinted(contract.conditions, reference)[1], FINGERPRINTS),
    }
    if contract.mixes_guidance:
        shapes["null"] = steps, *each
    if contract.learned_variance:
        shapes["variance"] = steps, *each
    if contract.end is not None:
        sizes = [int(size) for size in contract.end.gives[0].shape[2:]]
        if (frames := reference.frames).size:
            if (
                len(sizes) != 3
                or frames.ndim != 1
                or frames.dtype.kind not in "iu"
                or not ((frames >= 0) & (frames < sizes[0])).all()
            ):
                raise UsageError(f"frames are {frames.tolist()}, expected numbers of a video's frames")
            sizes[0] = frames.size
        shapes["images"] = batch, *sizes, 3
    actual: dict[str, tuple[int, ...]] = {name: getattr(reference, name).shape for name in shapes}
    actual |= {f"encoded.{name}": values.shape for name, values in reference.encoded.items()}
    shapes |= {f"encoded.{name}": each for name in reference.encoded}
    for prefix, condition, rows in (("condition", reference.condition, batch), ("null", reference.negative or {}, 1)):
        actual |= {f"{prefix}.{name}": values.shape for name, values in condition.items()}
        shapes |= {f"{prefix}.{name}": (rows, *values.shape[1:]) for name, values in condition.items()}
    for name, shape in shapes.items():
        if actual[name] != shape:
            raise UsageError(f"{name} has shape {[*actual[name]]}, expected {[*shape]}")
    last = max(1, contract.process.train_steps)
    if not ((reference.timesteps >= 0) & (reference.timesteps <= last)).all():
        raise UsageError(f"timesteps holds numbers outside of 0 to {last}")
    for name in ARRAYS:
        kinds, array = {"seeds": "iu", "images": "iu"}.get(name, "fiu"), getattr(reference, name)
        if array.dtype.kind not in kinds:
            raise UsageError(f"{name} holds {array.dtype}; expected {'integers' if kinds == 'iu' else 'numbers'}")
        if not np.isfinite(array).all():
            raise UsageError(f"{name} holds values that are not finite")


def _wide(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _by_port(arrays: Mapping[str, NDArray[Any]], prefix: str, contract: Manifest) -> dict[str, NDArray[Any]]:
    names = {port.name: f"{prefix}.{port.name}" for port in contract.conditions}
    return {name: arrays[key] for name, key in names.items() if key in arrays}


def fingerprinted(ports: Sequence[Port], reference: Reference) -> tuple[Rows, int]:
    """Return the conditions that have a fingerprint: all of a single port of integers, else those of the reference.

    `ports` are the network's condition ports.
    """
    negative = reference.negative
    if len(ports) == 1 and ports[0].dtype == "int64" and not ports[0].shape:
        return {ports[0].name: np.arange(ports[0].size)}, ports[0].size
    parts = [reference.condition, *([negative] if negative else [])]
    rows = {name: np.concatenate([part[name] for part in parts]) for name in reference.condition}
    return rows, len(next(iter(rows.values()))) if rows else reference.seeds.size + 1


def fingerprint(engines: Engines, conditions: Rows, count: int, timestep: float) -> NDArray[np.float32]:
    """Return what the loop reads of each condition at one timestep, projected onto a few seeded directions; (F, 4)."""
    contract = engines.manifest
    size = min((stage.max_batch for stage in contract.before_loop), default=1)
    parts: list[NDArray[Any]] = []
    directions: NDArray[Any] = np.empty(0)
    for first in range(0, count, size):
        some = {name: rows[first : first + size] for name, rows in conditions.items()}
        vectors = _hoisted(engines, some, min(size, count - first), timestep)
        if not first:
            width = vectors.shape[1]
            directions = Noise(FINGERPRINT_SEED).normal((width, FINGERPRINTS)) / math.sqrt(max(1, width))
        parts.append(vectors @ directions)
    return np.concatenate(parts).astype(np.float32)


def _hoisted(engines: Engines, conditions: Rows, count: int, timestep: float) -> NDArray[Any]:
    """Return all tensors that the step stage reads from stages, in the order of its reads; (count, width)."""
    contract = engines.manifest
    whole = engines.options.low_memory
    sources = open_sources(contract, engines.run, np.array([timestep]), conditions, count, whole=whole)
    made = {spec.name for stage in contract.before_loop for spec in stage.gives}
    rows = np.arange(count)
    parts = [sources[spec.name].at(0, rows).reshape(count, -1) for spec in contract.step.grouped if spec.name in made]
    return np.concatenate(parts, axis=1) if parts else np.empty((count, 0), np.float32)
