"""The sampling loop: with the solver, or as its matrices where the state can stay with the engine.

Both go a step at a time, and yield what brings the state home.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import EngineError
from dit_runtime.sampling.solvers import Array, Solver

Home = Callable[[], Array]
Denoise = Callable[[NDArray[Any], int], tuple[NDArray[Any], NDArray[Any] | None]]  # state, step
Into = Callable[[Mapping[str, Any], Mapping[str, Any]], object]  # what is made of the first goes into the second
Inputs = Callable[[int, slice], Mapping[str, Any]]  # step, samples -> what the network reads but the state


class Device(NamedTuple):
    """Two engines that keep arrays between them."""

    put: Callable[[NDArray[Any]], Any]
    denoise: Into
    update: Into
    state: str  # the name of their input


def with_solver(solver: Solver, timesteps: Array, denoise: Denoise) -> Iterator[Home]:
    state, _ = next(solver)
    for step, t in enumerate(timesteps):
        prediction, variance = denoise(state, step)
        if not np.isfinite(prediction).all():
            raise EngineError(f"step {step + 1} (t = {t:g}): the prediction holds values that are not finite")
        try:
            state, _ = solver.send((prediction, variance))
        except StopIteration as end:
            state = end.value
        yield lambda: state  # noqa: B023 (asked for before the next step)


def with_matrices(matrices: Array, device: Device, x: NDArray[Any], inputs: Inputs, size: int) -> Iterator[Home]:
    """Go `size` samples at once; the host queues each step and waits for none that nobody looks at."""
    chunks = _chunks(len(x), size)
    states = [device.put(x[samples].astype(np.float32)) for samples in chunks]
    zeros = [np.zeros(part.shape, np.float32) for part in states]
    previous, predictions = ([device.put(part) for part in zeros] for _ in range(2))
    coefficients = device.put(matrices.astype(np.float32))

    def home() -> Array:
        state = np.concatenate([np.asarray(part) for part in states]).astype(np.float64)
        if not np.isfinite(state).all():
            raise EngineError(f"step {step + 1} or one before: the state holds values that are not finite")
        return state

    for step in range(len(matrices)):
        for samples, state, before, prediction in zip(chunks, states, previous, predictions, strict=True):
            device.denoise({device.state: state, **inputs(step, samples)}, {"prediction": prediction})
            values = {device.state: state, "prediction": prediction, "previous": before}
            device.update(values | {"coefficients": coefficients[step]}, {"kept": before, "next": state})
        yield home


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]
