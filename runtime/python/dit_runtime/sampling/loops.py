"""The sampling loop: with the solver on the host, or as its matrices where the state can stay with the engine.

A step that an engine failed in can be gone again in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import NotFinite, UsageError
from dit_runtime.sampling.caches import Cache
from dit_runtime.sampling.denoiser import Array
from dit_runtime.sampling.guidance import Groups
from dit_runtime.sampling.solvers import Solver

Home = Callable[[], Array]
Into = Callable[[Mapping[str, Any], Mapping[str, Any]], object]  # what is made of the first goes into the second
Advance = Callable[[int], Home]  # steps in their order
Inputs = Callable[[int, slice], Mapping[str, Any]]  # step, samples -> what the network reads but the state
Keep = Callable[[int, Array], Array]  # evaluations done, state -> the state with what a run must not change
Mix = Callable[[NDArray[Any]], NDArray[Any]]  # predictions of own conditions, then of negatives -> guided


class Device(NamedTuple):
    """Two engines that keep arrays between them."""

    put: Callable[[NDArray[Any]], Any]
    denoise: Into
    update: Into
    state: str  # the name of their input


class Trajectory:
    """The loop with the solver, in float64: it says what each step needs of the network, and calls nothing."""

    def __init__(
        self,
        solver: Solver,
        timesteps: Array,
        groups: Sequence[Groups | None],
        mix: Mix | None = None,
        cache: Cache | None = None,
        keep: Keep | None = None,
    ) -> None:
        """Stand before the first step; `groups` are those of each evaluation, None where its prediction is 0.

        `keep` changes single numbers of the state after each evaluation: solvers work number by number, so that their
        own state may differ there.
        """
        self.state, _ = next(solver)
        self.done = 0
        self.last: tuple[Array, NDArray[Any]] | None = None  # the state that the last step read, and its prediction
        self._solver, self._timesteps, self._groups, self._mix, self._cache = solver, timesteps, groups, mix, cache
        self._keep = keep
        self._variance: NDArray[Any] | None = None  # of the last evaluation
        self._guess = self._take_guess()

    def asks(self) -> Groups | None:
        """Return the groups that the next step evaluates; None where it needs no network, or none is left."""
        ended = self.done == len(self._groups)
        return None if ended or self._guess is not None else self._groups[self.done]

    def tell(self, prediction: NDArray[Any] | None, variance: NDArray[Any] | None) -> None:
        """Go the next step with what the network predicts of its groups, or without where it asks nothing."""
        groups, guess = self.asks(), self._guess
        if guess is None and prediction is not None and groups is not None:
            guess, self._variance = self._finish(groups, prediction, variance)
        elif guess is None or prediction is not None:
            answer = "no prediction" if prediction is None else "a prediction"
            raise UsageError(f"{self._where}: got {answer}; ask() says what the step needs")
        assert guess is not None
        self.last = self.state, guess
        try:
            self.state, _ = self._solver.send((guess, self._variance))
        except StopIteration as end:
            self.state = end.value
        self.done += 1
        if self._keep is not None:
            self.state = self._keep(self.done, self.state)
        self._guess = self._take_guess()

    def _finish(
        self, groups: Groups, prediction: NDArray[Any], variance: NDArray[Any] | None
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Return the guided prediction and the variance of the network's answer."""
        self._require_finite(prediction)
        if groups is Groups.APART and self._mix is not None:
            prediction, variance = self._mix(prediction), None if variance is None else np.split(variance, 2)[0]
            self._require_finite(prediction)
        if self._cache is not None:
            self._cache.add(self.done, self.state, prediction)
        return prediction, variance

    @property
    def _where(self) -> str:
        return f"step {self.done + 1} (t = {self._timesteps[self.done]:g})"

    def _require_finite(self, prediction: NDArray[Any]) -> None:
        if not np.isfinite(prediction).all():
            raise NotFinite(f"{self._where}: the prediction holds values that are not finite")

    def _take_guess(self) -> NDArray[Any] | None:
        """Return the next step's prediction where it needs no network."""
        if self.done == len(self._groups):
            return None
        groups = self._groups[self.done]
        if groups is None:
            return np.zeros(self.state.shape, np.float32)
        if self._cache is None:
            return None
        if self.done and self._groups[self.done - 1] is not groups:
            self._cache.clear()
        return self._cache.guess(self.done, self.state)


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
