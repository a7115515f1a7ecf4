"""The sampling loop: with the solver, or as its matrices where the latents can stay with the engine.

Both go a step at a time, `size` samples at once, and yield what brings the latents home.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.conditioning import Put
from dit_runtime.errors import EngineError
from dit_runtime.sampling.solvers import Array, Solver

Home = Callable[[], Array]
Denoise = Callable[[Mapping[str, Any]], Mapping[str, NDArray[Any]]]
Into = Callable[
    [Mapping[str, Any], Mapping[str, Any]], object
]  # what an engine makes of the first goes into the second
Given = Callable[[int, slice], Mapping[str, Any]]  # step, samples -> the denoiser's inputs but the latents


def with_solver(run: Solver, timesteps: Array, denoise: Denoise, given: Given, size: int) -> Iterator[Home]:
    state, _ = next(run)
    for step, t in enumerate(timesteps):
        parts = []
        for samples in _chunks(len(state), size):
            outputs = denoise({"latents": state[samples].astype(np.float32), **given(step, samples)})
            if not np.isfinite(outputs["prediction"]).all():
                raise EngineError(f"step {step + 1} (t = {t:g}): the denoiser's prediction holds values not finite")
            parts.append(outputs)
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        try:
            state, _ = run.send((whole["prediction"], whole.get("variance")))
        except StopIteration as end:
            state = end.value
        yield lambda: state  # noqa: B023 (asked for before the next step)


def with_matrices(
    matrices: Array, put: Put, denoise: Into, update: Into, x: NDArray[Any], given: Given, size: int
) -> Iterator[Home]:
    """The host queues each step and waits for none that nobody looks at."""
    chunks = _chunks(len(x), size)
    latents = [put(x[samples].astype(np.float32)) for samples in chunks]
    zeros = [np.zeros(part.shape, np.float32) for part in latents]
    kept, predictions = ([put(part) for part in zeros] for _ in range(2))
    coefficients = put(matrices.astype(np.float32))

    def home() -> Array:
        found = np.concatenate([np.asarray(part) for part in latents]).astype(np.float64)
        if not np.isfinite(found).all():
            raise EngineError(f"step {step + 1} or one before: the latents hold values not finite")
        return found

    for step in range(len(matrices)):
        for samples, state, before, prediction in zip(chunks, latents, kept, predictions, strict=True):
            denoise({"latents": state, **given(step, samples)}, {"prediction": prediction})
            states = {"latents": state, "prediction": prediction, "previous": before}
            update(states | {"coefficients": coefficients[step]}, {"kept": before, "next": state})
        yield home


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]
