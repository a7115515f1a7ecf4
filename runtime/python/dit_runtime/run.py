"""One trajectory, from noise or a picture to pictures, a step at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime import images
from dit_runtime.bundle.records import MEAN
from dit_runtime.conditions.condition import Rows
from dit_runtime.conditions.memo import Numbers
from dit_runtime.engines import Engines
from dit_runtime.errors import Stopped, UsageError
from dit_runtime.request import Request
from dit_runtime.sampling import loops
from dit_runtime.sampling.denoiser import Array
from dit_runtime.sampling.guidance import Groups
from dit_runtime.sampling.solvers import linear, solve
from dit_runtime.sampling.start import Start


class Ask(NamedTuple):
    """The input of the step stage for the next step of a run: B samples in G groups of conditions.

    Asks of one G may share a call: their states, weights and answers are stacked on axis 0, what has groups on axis 1.
    """

    step: int  # number of the evaluation, from 0
    groups: Groups
    time: float
    state: Array  # (B, *state)
    rows: Rows  # the run's condition rows by port, then its negative's
    numbers: Numbers  # of the rows that the step reads; (G, B)
    weights: NDArray[np.float32]  # (B,)
    inputs: Callable[[slice], dict[str, Any]]  # samples -> [G, B, *row] by name; the weights are [B], as "guidance"


class Run:
    """A request under way: `step()` until it returns False, or `result()` at once.

    A run on the `host` keeps the solver and all arrays in the host's memory. A batcher may step it: `ask()`, evaluate
    the step stage, `tell()`.
    """

    def __init__(self, engines: Engines, request: Request, *, host: bool = False) -> None:
        """Check the request, encode its prompts and its picture; no other stage runs before the first step."""
        engines = engines.at(request.size)
        contract = engines.manifest
        request = request.with_preset(contract)
        checked = request.check(contract, engines.tokenizers)
        condition = engines.encode(checked.condition)
        negative = checked.negative and engines.encode(checked.negative)
        self.steps = len(checked.timesteps)  # Heun's method has two for each of the request's
        self.done = 0
        self.rows = 0  # of the network, for each sample: evaluations × groups
        self._engines, self._output, self._cancelled = engines, request.output, False
        x, keep, shape = checked.latents, None, (checked.samples, *contract.state.shape)
        if checked.image is not None and contract.picture is not None:
            latents = engines.encode_pictures(checked.image)[MEAN]
            condition = condition | {contract.picture.name: np.broadcast_to(latents, shape)}
        elif checked.image is not None:
            start = Start(engines.encode_pictures(checked.image), shape, checked.draw, checked.levels)
            x = start.at(0)
            keep = None if checked.mask is None else partial(start.keep, mask=checked.mask)
        if x is None:
            x = checked.draw(shape)
        options: dict[str, Any] = {"eta": request.eta, "spacing": checked.spacing, "first": checked.first}
        solver = solve(contract.process, checked.solver, checked.steps, x, checked.draw, **options)
        self._times, self._weights = checked.timesteps, checked.weights
        self._groups, self._cache, policy = checked.groups, checked.cache, checked.policy
        self._inputs = inputs = engines.inputs(checked.timesteps, condition, negative, checked.weights, host)
        mix: loops.Mix | None = None
        if policy is not None:
            mix = partial(policy.mix, weights=checked.weights, channels=contract.guidance.channels)
        trajectory = loops.Trajectory(solver, checked.timesteps, self._groups, mix, self._cache, keep)
        self._trajectory = trajectory
        # Without `self`: in a cycle, the memory of a run that has ended would wait for the garbage collector.
        self._home: loops.Home = lambda: trajectory.state
        self._advance: loops.Advance | None = None
        planned = [groups for groups in self._groups if groups is not None]
        on_host = policy is not None or self._cache is not None or keep is not None
        host = host or on_host or len(planned) < self.steps
        step, update = (None, None) if host else engines.residents()
        matrices = None
        if update is not None:
            matrices = linear(contract.process, checked.solver, checked.steps, **options)
        if step is not None and contract.update is not None and matrices is not None:
            stages = partial(engines.run, contract.step), partial(engines.run, contract.update)
            device = loops.Device(step.put, *stages, contract.state.name)
            grouped = lambda number, samples: inputs(number, samples, planned[number])  # noqa: E731
            self._advance = loops.with_matrices(matrices, device, x, grouped, contract.step.max_batch)

    def __repr__(self) -> str:
        return f"<Run after step {self.done} of {self.steps}: {self.rows} rows a sample>"

    @property
    def planned_rows(self) -> int | None:
        """Return what `rows` is when the run has ended; None where its cache decides that step by step."""
        if self._cache is not None:
            return self._cache.count_rows(self._groups)
        return sum(groups.rows for groups in self._groups if groups is not None)

    def step(self) -> bool:
        """Go one step; return whether there is more to do.

        After an EngineError the same step can be tried again.
        """
        self._require_going()
        if self.done == self.steps:
            return False
        if self._advance is not None:
            self._home = self._advance(self.done)
            self._count(self._groups[self.done])
            return self.done < self.steps
        ask = self.ask()
        if ask is None:
            return self.tell()
        return self.tell(*self._engines.denoise(ask.state, self._inputs, ask.step, ask.groups))

    def ask(self) -> Ask | None:
        """Return what the next step needs of the network; None where it needs nothing, or none is left."""
        self._require_going()
        if self._advance is not None:
            raise UsageError("this run's state stays on a device; to ask, start it with host=True")
        groups = self._trajectory.asks()
        if groups is None:
            return None
        step, state, weights = self.done, self._trajectory.state, self._weights
        if groups is Groups.APART:
            state, weights = np.concatenate([state, state]), np.concatenate([weights, weights])
        inputs = lambda samples: self._inputs(step, samples, groups)  # noqa: E731
        rows, numbers = self._inputs.conditions, self._inputs.numbers(groups)
        return Ask(step, groups, float(self._times[step]), state, rows, numbers, weights, inputs)

    def tell(self, prediction: NDArray[Any] | None = None, variance: NDArray[Any] | None = None) -> bool:
        """Go the next step with the network's answer, or without where `ask()` is None; return whether more is left."""
        self._require_going()
        if self.done == self.steps:
            return False
        groups = self._trajectory.asks()
        self._trajectory.tell(prediction, variance)
        self._count(groups)
        return self.done < self.steps

    def _count(self, groups: Groups | None) -> None:
        self.done += 1
        self.rows += 0 if groups is None else groups.rows

    @property
    def state(self) -> NDArray[np.float64]:
        """The state after the last step, [B, *state]; on a device, this waits for it and brings it home."""
        return self._home()

    @property
    def last(self) -> tuple[Array, NDArray[Any]] | None:
        """Return the state that the last step read, and its prediction, guided or a cache's; of runs on the host."""
        return self._trajectory.last

    def cancel(self) -> None:
        """Let the next `step()` or `result()` raise Stopped; any thread may call this."""
        self._cancelled = True

    def _require_going(self) -> None:
        if self._cancelled:
            raise Stopped(f"stopped after step {self.done} of {self.steps}")

    def result(self) -> NDArray[Any]:
        """Do what steps are left; return uint8 [N, H, W, 3], or the final state, float32."""
        while self.step():
            pass
        state = self.state
        return state.astype(np.float32) if self._output == "latents" else images.to_uint8(self._engines.decode(state))
