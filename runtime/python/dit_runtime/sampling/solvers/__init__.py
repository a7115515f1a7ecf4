"""One file a solver. A solver sees (x₀, ε) and the levels of a run, never what the network predicts; float64.

facts.json states each one's kinds of process, order and evaluations a step; METHODS holds the code by the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import UsageError
from dit_runtime.sampling.denoiser import Array, Method, estimate
from dit_runtime.sampling.noise import Draw, Noise
from dit_runtime.sampling.process import SOLVERS, Process, solver_of_order
from dit_runtime.sampling.schedule import Level, make_schedule
from dit_runtime.sampling.solvers.ddim import ddim
from dit_runtime.sampling.solvers.ddpm import ddpm
from dit_runtime.sampling.solvers.deis import deis
from dit_runtime.sampling.solvers.dpm import dpm
from dit_runtime.sampling.solvers.euler import euler
from dit_runtime.sampling.solvers.heun import heun
from dit_runtime.sampling.solvers.scm import scm
from dit_runtime.sampling.solvers.sde import sde
from dit_runtime.sampling.solvers.unipc import unipc

MULTISTEP_METHODS: dict[str, Callable[..., Method]] = {
    "dpm++": dpm,
    "sde-dpm++": partial(dpm, noisy=True),
    "unipc": unipc,
    "deis": deis,
}
METHODS: dict[str, Callable[..., Method]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "sde": sde,
    "scm": scm,
    **{
        solver: partial(method, order=order)
        for name, method in MULTISTEP_METHODS.items()
        for order, solver in solver_of_order(name).items()
    },
}
EVALUATIONS: dict[str, int] = {name: facts["evaluations"] for name, facts in SOLVERS.items()}  # a step
# A run: yields x and the time there, is sent (prediction, variance or None), and returns the final x.
Solver = Generator[tuple[Array, float], tuple[NDArray[Any], NDArray[Any] | None], Array]

SHORT = 15  # steps: runs of fewer lower their order at the end
LARGE = 1e6  # any clipping solver clips values of this size


def plan(process: Process, solver: str, steps: int, spacing: str | None = None) -> Array:
    """Return every time that a run's network reads, in order; (N,), or (2 N,) where a step evaluates it twice."""
    return np.array([level.time for level in levels(process, solver, steps, spacing)])


def levels(process: Process, solver: str, steps: int, spacing: str | None = None, first: int = 0) -> list[Level]:
    """Return the level at which each evaluation reads the state, of a run that leaves out the `first` steps."""
    schedule = make_schedule(process, solver, steps, spacing)
    return [level for step in schedule[first:] for level in step[: EVALUATIONS[solver]]]


def solve(
    process: Process,
    solver: str,
    steps: int,
    x: NDArray[Any],
    draw: Draw,
    *,
    eta: float = 0.0,
    spacing: str | None = None,
    first: int = 0,
) -> Solver:
    """Return a run from x that draws its noise with `draw`; refuse what does not fit before the first step.

    It leaves out the `first` steps; whether a run is short is a matter of all of them, as in diffusers.
    """
    whole, sampler = make_schedule(process, solver, steps, spacing), process.sampler
    if len(whole) >= SHORT and SOLVERS[solver].get("multistep") != "unipc":  # whose short runs are of any length
        sampler = replace(sampler, lower_order_final=False)
    if not 0 <= eta <= 1:
        raise UsageError(f"eta is {eta!r}; expected a number from 0 (deterministic) to 1")
    if eta and solver != "ddim":
        raise UsageError(f"eta is {eta!r} with solver {solver}; only ddim takes it")

    def exact(shape: tuple[int, ...]) -> Array:
        return draw(shape).astype(np.float64)

    return _run(process, METHODS[solver](whole[first:], np.asarray(x, np.float64), exact, sampler, eta))


def _run(process: Process, method: Method) -> Solver:
    x, level = next(method)
    while True:
        prediction, variance = yield x, level.time
        try:
            x, level = method.send(estimate(process.prediction, x, prediction, variance, level))
        except StopIteration as end:
            final: Array = end.value
            return final


def linear(
    process: Process, solver: str, steps: int, *, eta: float = 0.0, spacing: str | None = None, first: int = 0
) -> Array | None:
    """Return a run as a matrix M an evaluation, (memory', x') = M (x, prediction, memory); (N, 2, 3).

    The memory is the last x₀, or the last velocity of a solver that evaluates twice a step. Whether there are such
    matrices, and which, comes from the solver alone: it steps a few numbers, and where three coefficients do not
    explain all that it makes of them (it clips, draws noise or looks further back), None is the answer.
    """

    def draw(shape: tuple[int, ...]) -> NDArray[Any]:
        raise _Draws

    schedule = make_schedule(process, solver, steps, spacing)[first:]
    start, *numbers = LARGE * Noise(0).normal((EVALUATIONS[solver] * len(schedule) + 1, 8)).astype(np.float64)
    run = solve(process, solver, steps, start, draw, eta=eta, spacing=spacing, first=first)
    x, _ = next(run)
    memory, matrices = np.zeros_like(x), []
    for index, prediction in enumerate(numbers):
        known = np.stack([x, prediction, memory], axis=1)
        try:
            after, _ = run.send((prediction, np.zeros_like(x)))
        except StopIteration as end:
            after = end.value
        except _Draws:
            return None
        coefficients = np.linalg.lstsq(known / LARGE, after / LARGE)[0]
        if np.linalg.norm(known @ coefficients - after) > 1e-9 * np.linalg.norm(after):
            return None
        keeping = np.array([0.0, 1.0])
        if EVALUATIONS[solver] == 1:
            x_part, prediction_part = np.eye(2)
            keeping = estimate(process.prediction, x_part, prediction_part, None, schedule[index].now).x0
        matrices.append([[*keeping, 0.0], coefficients])
        x, memory = after, known[:, :2] @ keeping
    return np.array(matrices)


class _Draws(Exception):
    """A solver asked for noise."""
