"""The sampling loop: with the solver on the host, or as its matrices where the state can stay with the engine.

A step that an engine failed in can be gone again in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import NotFinite, UsageError
from dit_runtime.sampling.guidance import Groups
from dit_runtime.sampling.solvers import Array, Solver

Home = Callable[[], Array]
Into = Callable[[Mapping[str, Any], Mapping[str, Any]], object]  # what is made of the first goes into the second
Advance = Callable[[int], Home]  # steps in their order
Inputs = Callable[[int, slice], Mapping[str, Any]]  # step, samples -> what the network reads but the state


class Device(NamedTuple):
    """Two engines that keep arrays between them."""

    put: Callable[[NDArray[Any]], Any]
    denoise: Into
    update: Into
    state: str  # the name of their input


class Trajectory:
    """The loop with the solver, in float64: it says what each step needs of the network, and calls nothing."""

    def __init__(self, solver: Solver, timesteps: Array, groups: Sequence[Groups]) -> None:
        """Stand before the first step; `groups` are those of each evaluation."""
        self.state, _ = next(solver)
        self.done = 0
        self._solver, self._timesteps, self._groups = solver, timesteps, groups

    def asks(self) -> Groups | None:
        """Return the groups that the next step evaluates; None where it needs no network, or none is left."""
        return self._groups[self.done] if self.done < len(self._groups) else None

    def tell(self, prediction: NDArray[Any] | None, variance: NDArray[Any] | None) -> None:
        """Go the next step with what the network predicts of its groups."""
        where = f"step {self.done + 1} (t = {self._timesteps[self.done]:g})"
        if prediction is None:
            raise UsageError(f"{where}: got no prediction; ask() says what the step needs")
        if not np.isfinite(prediction).all():
            raise NotFinite(f"{where}: the prediction holds values that are not finite")
        try:
            self.state, _ = self._solver.send((prediction, variance))
        except StopIteration as end:
            self.state = end.value
        self.done += 1


def with_matrices(matrices: Array, device: Device, x: NDArray[Any], inputs: Inputs, size: int) -> Advance:
    """Return a function of the step's number that goes this step and returns what brings the state home.

    It goes `size` samples at once; the host queues each step and waits for none that nobody looks at.
    """
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
