"""One trajectory, from noise to pictures, a step at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime import images
from dit_runtime.engines import Engines
from dit_runtime.errors import Stopped
from dit_runtime.request import Request
from dit_runtime.sampling import loops
from dit_runtime.sampling.solvers import linear, solve


class Run:
    """A request under way: `step()` until it returns False, or `result()` at once."""

    def __init__(self, engines: Engines, request: Request) -> None:
        """Check the request and encode its prompts; no other stage runs before the first step."""
        contract = engines.manifest
        request = request.with_preset(contract)
        checked = request.check(contract, engines.tokenizers)
        condition = engines.encode(checked.condition)
        negative = checked.negative and engines.encode(checked.negative)
        self.steps = len(checked.timesteps)  # evaluations of the network; a step of Heun's method has two
        self.done = 0
        self._engines, self._output, self._cancelled = engines, request.output, False
        x = checked.latents
        if x is None:
            x = checked.draw((checked.samples, *contract.state.shape))
        self._home: loops.Home = lambda: np.asarray(x, np.float64)
        options: dict[str, Any] = {"eta": request.eta, "spacing": request.spacing}
        solver = solve(contract.process, checked.solver, checked.steps, x, checked.draw, **options)
        inputs = engines.inputs(checked.timesteps, condition, negative, checked.weights)
        step, update = engines.residents()
        matrices = None
        if update is not None:
            matrices = linear(contract.process, checked.solver, checked.steps, **options)
        if step is None or contract.update is None or matrices is None:
            denoise = lambda state, number: engines.denoise(state, inputs, number)  # noqa: E731
            self._advance = loops.with_solver(solver, checked.timesteps, denoise)
        else:
            stages = partial(engines.run, contract.step), partial(engines.run, contract.update)
            device = loops.Device(step.put, *stages, contract.state.name)
            self._advance = loops.with_matrices(matrices, device, x, inputs, contract.step.max_batch)

    def step(self) -> bool:
        """Evaluate the network once more; return whether there is more to do.

        After an EngineError the same step can be tried again.
        """
        if self._cancelled:
            raise Stopped(f"stopped after step {self.done} of {self.steps}")
        if self.done < self.steps:
            self._home, self.done = self._advance(self.done), self.done + 1
        return self.done < self.steps

    @property
    def state(self) -> NDArray[np.float64]:
        """The state after the last step, [B, *state]; on a device, this waits for it and brings it home."""
        return self._home()

    def cancel(self) -> None:
        """Let the next `step()` or `result()` raise Stopped; any thread may call this."""
        self._cancelled = True

    def result(self) -> NDArray[Any]:
        """Do what steps are left; return uint8 [N, H, W, 3], or the final state, float32."""
        while self.step():
            pass
        state = self.state
        return state.astype(np.float32) if self._output == "latents" else images.to_uint8(self._engines.decode(state))
