"""The sampling loop: with the solver, or as its matrices where the state can stay with the engine.

Both return a function of the step's number that goes this step and returns what brings the state home. A step that an
engine failed in can be gone again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import NotFinite
from dit_runtime.sampling.solvers import Array, Solver

Home = Callable[[], Array]
Denoise = Callable[[NDArray[Any], int], tuple[NDArray[Any], NDArray[Any] | None]]  # state, step
Into = Callable[[Mapping[str, Any], Mapping[str, Any]], object]  # what is made of the first goes into the second
Advance = Callable[[int], Home]  # steps in their order
Inputs = Callable[[int, slice], Mapping[str, Any]]  # step, samples -> what the network reads but the state


class Device(NamedTuple):
    """Two engines that keep arrays between them."""

    put: Callable[[NDArray[Any]], Any]
    denoise: Into
    update: Into
    state: str  # the name of their input


def with_solver(solver: Solver, timesteps: Array, denoise: Denoise) -> Advance:
    """Let the solver, in float64 on the host, make each state."""
    state, _ = next(solver)

    def advance(step: int) -> Home:
        nonlocal state
        prediction, variance = denoise(state, step)
        if not np.isfinite(prediction).all():
            raise NotFinite(
                f"step {step + 1} (t = {timesteps[step]:g}): the prediction holds values that are not finite"
            )
        try:
            state, _ = solver.send((prediction, variance))
        except StopIteration as end:
            state = end.value
        reached = state
        return lambda: reached

    return advance


def with_matrices(matrices: Array, device: Device, x: NDArray[Any], inputs: Inputs, size: int) -> Advance:
    """Go `size` samples at once; the host queues each step and waits for none that nobody looks at."""
    chunks = _chunks(len(x), size)
    states = [device.put(x[samples].astype(np.float32)) for samples in chunks]
    zeros = [np.zeros(part.shape, np.float32) for part in states]
    previous, predictions = ([device.put(part) for part in zeros] for _ in range(2))
    coefficients = device.put(matrices.astype(np.float32))
    updated = [0] * len(chunks)  # steps of each chunk; more than the step's number where a later chunk failed

    def advance(step: int) -> Home:
        for index, samples in enumerate(chunks):
            if updated[index] > step:
                continue
            state, before, prediction = states[index], previous[index], predictions[index]
            device.denoise({device.state: state, **inputs(step, samples)}, {"prediction": prediction})
            values = {device.state: state, "prediction": prediction, "previous": before}
            device.update(values | {"coefficients": coefficients[step]}, {"kept": before, "next": state})
            updated[index] += 1

        def home() -> Array:
            state = np.concatenate([np.asarray(part) for part in states]).astype(np.float64)
            if not np.isfinite(state).all():
                raise NotFinite(f"step {step + 1} or one before: the state holds values that are not finite")
            return state

        return home

    return advance


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]
