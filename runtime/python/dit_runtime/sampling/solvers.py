"""Solvers as generators: each yields (x, t), is sent (prediction, variance or None), and returns the final x.

Those of a noise schedule are written in ᾱ alone, α = √ᾱ and σ = √(1 - ᾱ); those of a velocity in t, from noise at 0 to
data at 1. A prime marks what is after the step. Arithmetic is float64.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import UsageError
from dit_runtime.sampling.noise import Draw, Noise
from dit_runtime.sampling.schedule import (
    FLOW_SOLVERS,
    ORDERS,
    SOLVERS,
    Diffusion,
    Schedule,
    log_snr,
    make_schedule,
    require_fit,
    require_steps,
    timesteps,
)

Array = NDArray[np.float64]
Solver = Generator[tuple[Array, float], tuple[NDArray[Any], NDArray[Any] | None], Array]

EVALUATIONS = {solver: 2 if solver == "heun" else 1 for solver in SOLVERS}  # of the network, a step
LAST_STEP = 0.04  # of the SDE: its authors' value
LARGE = 1e6  # what clips at all clips at this


def plan(diffusion: Diffusion, solver: str, steps: int, spacing: str | None = None) -> Array:
    """Every t that a run will ask for, in order; (N,), or (2 N,) where a step asks twice."""
    if solver not in FLOW_SOLVERS:
        return timesteps(diffusion, solver, steps, spacing).astype(np.float64)
    times = flow_times(diffusion, solver, steps, spacing)
    return times.repeat(2)[1:-1] if EVALUATIONS[solver] == 2 else times[:-1]


def flow_times(diffusion: Diffusion, solver: str, steps: int, spacing: str | None = None) -> Array:
    """A step's t and the next one's, evenly from 0 to 1; where noise is added, a last step of LAST_STEP; (N + 1,)."""
    require_fit(diffusion, solver)
    require_steps(diffusion, steps)
    if spacing:
        raise UsageError(f"spacing is {spacing!r} with solver {solver}; its steps are even")
    if solver != "sde":
        return np.arange(steps + 1) / steps
    if steps < 2:
        raise UsageError(
            f"steps is {steps} with solver {solver}; expected at least 2, for its last is one of {LAST_STEP}"
        )
    return np.append(np.arange(steps) / (steps - 1) * (1 - LAST_STEP), 1.0)


def solve(
    diffusion: Diffusion,
    solver: str,
    steps: int,
    x: NDArray[Any],
    draw: Draw,
    *,
    eta: float = 0.0,
    spacing: str | None = None,
) -> Solver:
    """A run from x_T that draws its noise with `draw(shape)`; eta belongs to DDIM."""
    if not 0 <= eta <= 1:
        raise UsageError(f"eta is {eta!r}; expected a number from 0 (deterministic) to 1")
    if eta and solver != "ddim":
        raise UsageError(f"eta is {eta!r} with solver {solver}; only ddim takes it")
    x = np.asarray(x, np.float64)
    if solver in FLOW_SOLVERS:
        times = flow_times(diffusion, solver, steps, spacing)
        if solver == "sde":
            return sde(times, x, draw)
        return euler(times, x) if solver == "euler" else heun(times, x)
    schedule = make_schedule(diffusion, solver, steps, spacing)
    if solver == "ddpm":
        return ddpm(diffusion, schedule, x, draw)
    if solver == "ddim":
        return ddim(diffusion, schedule, x, draw, eta)
    return dpm(diffusion, schedule, x, ORDERS[solver])


def linear(
    diffusion: Diffusion, solver: str, steps: int, *, eta: float = 0.0, spacing: str | None = None
) -> Array | None:
    """A run as a matrix M an evaluation, (kept, x') = M (x, prediction, what was kept before); (N, 2, 3).

    Kept is x₀, or the velocity itself. Whether there are such matrices, and which, comes from the solver alone: it
    steps a few numbers, and where three coefficients do not explain all that it makes of them (it clips, draws noise
    or looks further back), None is the answer.
    """

    def draw(shape: tuple[int, ...]) -> NDArray[Any]:
        raise _Draws

    times = plan(diffusion, solver, steps, spacing)
    levels = None if solver in FLOW_SOLVERS else make_schedule(diffusion, solver, steps, spacing).alpha_bar
    start, *numbers = LARGE * Noise(0).normal((len(times) + 1, 8)).astype(np.float64)
    run = solve(diffusion, solver, steps, start, draw, eta=eta, spacing=spacing)
    x, _ = next(run)
    kept, matrices = np.zeros_like(x), []
    for index, prediction in enumerate(numbers):
        known = np.stack([x, prediction, kept], axis=1)
        try:
            after, _ = run.send((prediction, np.zeros_like(x)))
        except StopIteration as end:
            after = end.value
        except _Draws:
            return None
        found = np.linalg.lstsq(known / LARGE, after / LARGE)[0]
        if np.linalg.norm(known @ found - after) > 1e-9 * np.linalg.norm(after):
            return None
        keeping = np.array([0.0, 1.0])
        if levels is not None:
            keeping, _ = _denoised(diffusion, np.array([1.0, 0.0]), np.array([0.0, 1.0]), levels[index])
        matrices.append([[*keeping, 0.0], found])
        x, kept = after, known[:, :2] @ keeping
    return np.array(matrices)


class _Draws(Exception):
    """A solver asked for noise."""


def ddpm(diffusion: Diffusion, schedule: Schedule, x: Array, draw: Draw) -> Solver:
    """DDPM, Ho et al. 2020 (arXiv 2006.11239), algorithm 2, on the steps that are kept.

    α = ᾱ / ᾱ',  β = 1 - α,  x' = √ᾱ' β / (1 - ᾱ) x₀ + √α (1 - ᾱ') / (1 - ᾱ) x + σ z, with z = 0 at t = 0.
    """
    for t, level, after in zip(*schedule, strict=True):
        prediction, variance = yield x, float(t)
        x0, _ = _denoised(diffusion, x, prediction, level)
        x0 = _clipped(diffusion, x0)
        alpha = level / after
        x = math.sqrt(after) * (1 - alpha) / (1 - level) * x0 + math.sqrt(alpha) * (1 - after) / (1 - level) * x
        if t > 0:
            deviation = _deviation(diffusion.sampler.variance, variance, level, after)
            x = x + deviation * draw(x.shape).astype(np.float64)
    return x


def ddim(diffusion: Diffusion, schedule: Schedule, x: Array, draw: Draw, eta: float) -> Solver:
    """DDIM, Song et al. 2020 (arXiv 2010.02502), equations 12 and 16.

    s = η √((1 - ᾱ') / (1 - ᾱ)) √(1 - ᾱ / ᾱ'),  x' = √ᾱ' x₀ + √(1 - ᾱ' - s²) ε + s z, with no draw where s = 0.
    """
    for t, level, after in zip(*schedule, strict=True):
        prediction, _ = yield x, float(t)
        x0, epsilon = _denoised(diffusion, x, prediction, level)
        x0 = _clipped(diffusion, x0)
        deviation = eta * math.sqrt((1 - after) / (1 - level) * (1 - level / after))
        x = math.sqrt(after) * x0 + math.sqrt(1 - after - deviation**2) * epsilon
        if deviation > 0:
            x = x + deviation * draw(x.shape).astype(np.float64)
    return x


def dpm(diffusion: Diffusion, schedule: Schedule, x: Array, order: int) -> Solver:
    """DPM-Solver++ multistep, Lu et al. 2022 (arXiv 2211.01095), algorithm 2, and its third-order sibling.

    x' = σ'/σ x + α' (φ₁ D₀ + φ₂ D₁ + φ₃ D₂),  h = λ' - λ,  φ₁ = 1 - e⁻ʰ,  φ₂ = 1 - φ₁/h,  φ₃ = 1/2 - φ₂/h,
    where D₀ is the predicted x₀ and D₁, D₂ its scaled differences over past steps; "midpoint" has φ₂ = φ₁/2 in
    second-order steps. φ₃ is the authors' (and diffusers'), half of Taylor's: the observed order is 2 to 3.
    """
    sampler, count = diffusion.sampler, len(schedule.timesteps)
    short = sampler.lower_order_final and count < 15
    data: list[Array] = []  # predicted x₀, newest first
    lambdas: list[float] = []
    for index, (t, level, after) in enumerate(zip(*schedule, strict=True)):
        prediction, _ = yield x, float(t)
        data = [_denoised(diffusion, x, prediction, level)[0], *data[: order - 1]]
        lambdas = [log_snr(level), *lambdas[: order - 1]]
        now = len(data)
        if index == count - 1 and (short or sampler.euler_at_final or after in (1, level)):
            now = 1
        elif index == count - 2 and short:
            now = min(now, 2)
        h = log_snr(after) - lambdas[0]
        phi1 = -math.expm1(-h)
        step = phi1 * data[0]
        if now > 1:
            first = (data[0] - data[1]) * (h / (lambdas[0] - lambdas[1]))
            phi2 = 1 - phi1 / h
        if now == 2:
            step = step + (phi1 / 2 if sampler.solver_type == "midpoint" else phi2) * first
        if now == 3:
            second = (data[1] - data[2]) * (h / (lambdas[1] - lambdas[2]))
            bend = (first - second) * (h / (lambdas[0] - lambdas[2]))
            slope = first + bend * ((lambdas[0] - lambdas[1]) / h)
            step = step + phi2 * slope + (0.5 - phi2 / h) * bend
        x = math.sqrt((1 - after) / (1 - level)) * x + math.sqrt(after) * step
    return x


def euler(times: Array, x: Array) -> Solver:
    """Euler's method on dx/dt = v, the flow from noise to data: x' = x + (t' - t) v."""
    for t, after in pairwise(times):
        velocity, _ = yield x, float(t)
        x = x + (after - t) * np.asarray(velocity, np.float64)
    return x


def heun(times: Array, x: Array) -> Solver:
    """Heun's method on the same flow, of order 2: x' = x + (t' - t) (v(x, t) + v(x + (t' - t) v, t')) / 2."""
    for t, after in pairwise(times):
        velocity, _ = yield x, float(t)
        first = np.asarray(velocity, np.float64)
        velocity, _ = yield x + (after - t) * first, float(after)
        x = x + (after - t) / 2 * (first + np.asarray(velocity, np.float64))
    return x


def sde(times: Array, x: Array, draw: Draw) -> Solver:
    """Euler-Maruyama on SiT's reverse SDE, Ma et al. 2024 (arXiv 2401.08740), with their default coefficient.

    dx = (v + w s) dt + √(2 w) dW,  w = 1 - t,  and the score s = -ε / (1 - t) = (t v - x) / (1 - t): so the drift is
    (1 + t) v - x. The last step is the drift alone.
    """
    for t, after in pairwise(times):
        velocity, _ = yield x, float(t)
        x = x + (after - t) * ((1 + t) * np.asarray(velocity, np.float64) - x)
        if after < 1:
            x = x + math.sqrt(2 * (1 - t) * (after - t)) * draw(x.shape).astype(np.float64)
    return x


def _denoised(diffusion: Diffusion, x: Array, prediction: NDArray[Any], level: float) -> tuple[Array, Array]:
    """x₀ and ε from what the network predicts: x = α x₀ + σ ε, v = α ε - σ x₀ (Salimans & Ho 2022)."""
    alpha, sigma = math.sqrt(level), math.sqrt(1 - level)
    output = np.asarray(prediction, np.float64)
    if diffusion.prediction == "epsilon":
        return (x - sigma * output) / alpha, output
    if diffusion.prediction == "sample":
        return output, (x - alpha * output) / sigma
    return alpha * x - sigma * output, alpha * output + sigma * x


def _clipped(diffusion: Diffusion, x0: Array) -> Array:
    bound = diffusion.sampler.clip_sample_range
    return np.clip(x0, -bound, bound) if diffusion.sampler.clip_sample else x0


def _deviation(kind: str, variance: NDArray[Any] | None, level: float, after: float) -> float | Array:
    """σ of a DDPM step, Nichol & Dhariwal 2021 (arXiv 2102.09672), equations 9, 10 and 15.

    fixed_large: β;  fixed_small: β̃ = (1 - ᾱ') / (1 - ᾱ) β;  learned_range: log σ² = f log β + (1 - f) log β̃,
    f = (v + 1) / 2.
    """
    large = 1 - level / after
    small = max((1 - after) / (1 - level) * large, 1e-20)
    if kind == "fixed_small":
        return math.sqrt(small)
    if kind == "fixed_large":
        return math.sqrt(large)
    if variance is None:
        raise UsageError(
            f"ddpm with {kind!r} variance needs a model that predicts its variance, and this one does not; take ddim"
        )
    output = np.asarray(variance, np.float64)
    if kind == "learned":
        return np.sqrt(output)
    part = (output + 1) / 2
    return np.exp(0.5 * (part * math.log(large) + (1 - part) * math.log(small)))
