"""The steps of a run: the noise levels that each one leads from and to."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import UsageError, nearest
from dit_runtime.facts import CONSTANTS
from dit_runtime.sampling.process import (
    FLOW_SPACINGS,
    MULTISTEP,
    SPACINGS,
    Process,
    Sampler,
    require_fit,
    require_steps,
)

FIRST_ANGLE: float = CONSTANTS["scm_first_angle"]  # of SCM: its authors' values, the second in a run of two steps
SECOND_ANGLE: float = CONSTANTS["scm_second_angle"]
LAST_STEP: float = CONSTANTS["sde_last_step"]  # of the SDE, in σ: its authors' value


class Level(NamedTuple):
    """A point of the process, x = α x₀ + σ ε, and the time that the network reads there."""

    time: float  # a training step, or a flow's σ, or what `flow_times` makes of it
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """λ = log(α/σ), half the logarithm of the signal-to-noise ratio; ∞ without noise, -∞ without signal."""
        if not self.alpha:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf


class Step(NamedTuple):
    now: Level
    after: Level


def make_schedule(process: Process, solver: str, steps: int, spacing: str | None = None) -> list[Step]:
    """Return a run's steps, noisiest first."""
    if process.kind == "flow":
        points = zip(
            flow_times(process, solver, steps, spacing).tolist(),
            sigmas(process, solver, steps, spacing).tolist(),
            strict=True,
        )
        return [Step(*pair) for pair in pairwise(Level(time, 1 - sigma, sigma) for time, sigma in points)]
    return _noise_steps(process, solver, steps, spacing)


def sigmas(process: Process, solver: str, steps: int, spacing: str | None = None) -> NDArray[np.float64]:
    """Return the σ before each step of a flow and a last 0; (N + 1,), each one exact in float32.

    "trailing" is 1, 1 - 1/N … 1/N, as SiT and diffusers' Flux pipeline have it; "linspace" ends at sigma_min, as in
    diffusers' SD3 pipeline. "discrete" is "trailing" times 1 - 1/T of T training steps, as in diffusers' multistep
    schedulers. "integer" is training steps from T to 1, each rounded down, over T, as in diffusers' CogView4 pipeline.
    The SDE's are even down to LAST_STEP; SCM's come from angles φ, σ = sin φ / (sin φ + cos φ). Then
    σ' = s σ / (1 + (s - 1) σ), where s = shift e^(shift_growth · N), and
    1 - σ'' = (1 - σ') (1 - shift_terminal) / (1 - σ' of the last step).
    """
    return _single(_shifted_points(process, solver, steps, spacing))


def flow_times(process: Process, solver: str, steps: int, spacing: str | None = None) -> NDArray[np.float64]:
    """Return what the network reads at each σ of a flow.

    It reads σ itself; ⌊T σ⌋ / T for "discrete"; σ before the shift for "integer".
    """
    points = _shifted_points(process, solver, steps, spacing)
    kind = None if solver in OWN_POINTS else spacing or process.sampler.flow_spacing
    if kind == "discrete":
        points = np.floor(points * process.train_steps) / process.train_steps
    if kind == "integer":
        points = _even_points(process, solver, steps, spacing)
    return _single(points)


def _single(points: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.append(points, 0.0).astype(np.float32).astype(np.float64)


def _shifted_points(process: Process, solver: str, steps: int, spacing: str | None) -> NDArray[np.float64]:
    require_fit(process, solver)
    require_steps(process, steps)
    own = OWN_POINTS.get(solver)
    points = own(steps, spacing) if own else _even_points(process, solver, steps, spacing)
    shift = process.shift_over(steps)
    shifted = shift * points / (1 + (shift - 1) * points)
    if process.shift_terminal is not None:
        if steps < 2:
            raise UsageError(f"steps is {steps}; expected at least 2, for shift_terminal is {process.shift_terminal}")
        shifted = 1 - (1 - shifted) * ((1 - process.shift_terminal) / (1 - shifted[-1]))
    return shifted


def _even_points(process: Process, solver: str, steps: int, spacing: str | None) -> NDArray[np.float64]:
    spacing = spacing or process.sampler.flow_spacing
    if spacing not in FLOW_SPACINGS:
        raise UsageError(f"spacing is {spacing!r} with solver {solver}; take one of {', '.join(FLOW_SPACINGS)}")
    if spacing == "linspace":
        return np.linspace(1, process.sigma_min, steps)
    if spacing == "discrete":  # in diffusers' order of operations: ⌊T σ⌋ depends on the last bit
        return (1 - np.linspace(1, 1 / process.train_steps, steps + 1))[:0:-1]
    if spacing == "integer":
        return np.floor(np.linspace(process.train_steps, 1, steps)) / process.train_steps
    return 1 - np.arange(steps) / steps


def _sde_points(steps: int, spacing: str | None) -> NDArray[np.float64]:
    if spacing:
        raise UsageError(f"spacing is {spacing!r} with solver sde; its steps are even, and its last is {LAST_STEP}")
    if steps < 2:
        raise UsageError(f"steps is {steps} with solver sde; expected at least 2, for its last is one of {LAST_STEP}")
    return 1 - np.arange(steps) / (steps - 1) * (1 - LAST_STEP)


def _scm_points(steps: int, spacing: str | None) -> NDArray[np.float64]:
    if spacing:
        raise UsageError(f"spacing is {spacing!r} with solver scm; its angles are even from {FIRST_ANGLE} on")
    angles = np.linspace(FIRST_ANGLE, 0, steps + 1)[:-1]
    if steps == 2:
        angles[1] = SECOND_ANGLE
    return np.sin(angles) / (np.cos(angles) + np.sin(angles))


OWN_POINTS = {"sde": _sde_points, "scm": _scm_points}  # of solvers that take no spacing


def _noise_steps(process: Process, solver: str, steps: int, spacing: str | None) -> list[Step]:
    """Return a noise process's steps.

    The level after a step is that of the next timestep, but for DDIM with the spacings of Lin et al.: there it is
    T // N training steps below, wherever the next timestep lies.
    """
    chosen = timesteps(process, solver, steps, spacing)
    levels, sampler = process.alpha_bar, process.sampler
    if solver in MULTISTEP:
        final = 1.0 if sampler.final_sigmas_type == "zero" else levels[0]
    else:
        final = 1.0 if solver == "ddpm" or sampler.set_alpha_to_one else levels[0]
    following = np.append(chosen[1:], -1)
    if solver == "ddim" and (spacing or sampler.ddim_spacing) in ("leading", "trailing", "linspace"):
        following = chosen - process.train_steps // steps

    def level(time: int) -> Level:
        bar = float(levels[time] if time >= 0 else final)
        return Level(float(time), math.sqrt(bar), math.sqrt(1 - bar))

    return [Step(level(now), level(after)) for now, after in zip(chosen.tolist(), following.tolist(), strict=True)]


def timesteps(process: Process, solver: str, steps: int, spacing: str | None = None) -> NDArray[np.int64]:
    """Return the training steps that a run visits, descending.

    "stride" and "respaced" are Nichol & Dhariwal 2021's (there "ddimN" and "N"); "leading", "trailing" and
    "linspace" are those of Lin et al. 2023, table 2. DPM-Solver++ divides the time into one interval a step, so
    its "leading" and "linspace" take N + 1 points and leave the last, t = 0, out.
    """
    require_fit(process, solver)
    require_steps(process, steps)
    total, sampler = process.train_steps, process.sampler
    spacing = spacing or _default_spacing(sampler, solver)
    if spacing not in SPACINGS:
        close = nearest(str(spacing), SPACINGS)
        raise UsageError(f"spacing {spacing!r} is not known{close}; known: {', '.join(SPACINGS)}")

    multistep = solver in MULTISTEP
    end = _count_unclipped(process) if multistep else total
    if not end:
        raise UsageError(f"lambda_min_clipped is {sampler.lambda_min_clipped}: it leaves none of the {total} timesteps")
    points = steps + 1 if multistep else steps
    chosen: NDArray[Any]
    if spacing == "stride":
        chosen = np.arange(0, total, _stride(total, steps))[::-1]
    elif spacing == "respaced":
        stride = (total - 1) / (steps - 1) if steps > 1 else 1.0
        # A running sum, not a product: where it falls on a half, rounding depends on it.
        chosen = np.add.accumulate([0.0] + [stride] * (steps - 1)).round()[::-1]
    elif spacing == "leading":
        chosen = (np.arange(points) * (end // points) + sampler.steps_offset)[::-1][:steps]
    elif spacing == "linspace":
        chosen = np.linspace(0, end - 1, points).round()[::-1][:steps]
    else:
        # The rounded difference, as a floating-point range counts: ties depend on it here too.
        chosen = (end + np.arange(steps) * ((end - total / steps) - end)).round() - 1
        chosen = chosen[chosen >= 0]
    if not len(chosen) or chosen[0] >= total or (np.diff(chosen) >= 0).any():
        raise UsageError(
            f"{steps} steps of {solver} with {spacing!r} spacing do not fit into {total} training steps; take fewer"
        )
    return chosen.astype(np.int64)


def _default_spacing(sampler: Sampler, solver: str) -> str:
    if solver in MULTISTEP:
        return sampler.dpm_spacing
    return sampler.ddpm_spacing if solver == "ddpm" else sampler.ddim_spacing


def _count_unclipped(process: Process) -> int:
    floor, levels = process.sampler.lambda_min_clipped, process.alpha_bar
    return len(levels) if floor is None else int((0.5 * np.log(levels / (1 - levels)) >= floor).sum())


def _stride(total: int, steps: int) -> int:
    """Return the smallest integer stride that visits exactly `steps` of the training steps."""
    strides = {len(range(0, total, stride)): stride for stride in range(total - 1, 0, -1)}
    if steps not in strides:
        near = sorted(sorted(strides, key=lambda count: abs(count - steps))[:2])
        raise UsageError(
            f"{steps} steps have no integer stride in {total} training steps; the nearest that do: "
            f"{' and '.join(map(str, near))} (or take spacing 'respaced')"
        )
    return strides[steps]
