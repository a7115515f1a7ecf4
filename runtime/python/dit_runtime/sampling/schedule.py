"""The steps of a run: the noise levels that each one leads from and to."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import UsageError, nearest
from dit_runtime.facts import CONSTANTS
from dit_runtime.sampling.curves import curve, curve_ratios, training_ratios
from dit_runtime.sampling.process import (
    CURVES,
    FLOW_SPACINGS,
    MULTISTEP,
    SOLVERS,
    SPACINGS,
    Process,
    Sampler,
    is_number,
    require_fit,
    require_steps,
)

FIRST_ANGLE: float = CONSTANTS["scm_first_angle"]  # of SCM: its authors' values, the second in a run of two steps
SECOND_ANGLE: float = CONSTANTS["scm_second_angle"]
LAST_STEP: float = CONSTANTS["sde_last_step"]  # of the SDE, in σ: its authors' value
LARGEST: float = CONSTANTS["largest_sigma"]  # of a flow with a method that needs some signal: diffusers' value
NEEDS_SIGNAL = ("unipc", "deis")
CLIPPED = ("dpm++", "sde-dpm++")  # the methods that keep to lambda_min_clipped


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
    """Return a run's steps, noisiest first. The spacing is a name, or a list of times in words: "999, 640, 300"."""
    require_fit(process, solver)
    require_steps(process, steps)
    return list(_schedule(process, solver, steps, spacing))


@lru_cache(maxsize=32, typed=True)  # a request needs it several times, and requests are alike
def _schedule(process: Process, solver: str, steps: int, spacing: str | None) -> tuple[Step, ...]:
    if process.kind == "flow":
        points = zip(
            flow_times(process, solver, steps, spacing).tolist(),
            sigmas(process, solver, steps, spacing).tolist(),
            strict=True,
        )
        return tuple(Step(*pair) for pair in pairwise(Level(time, 1 - sigma, sigma) for time, sigma in points))
    return tuple(_noise_steps(process, solver, steps, spacing))


def sigmas(process: Process, solver: str, steps: int, spacing: str | None = None) -> NDArray[np.float64]:
    """Return the σ before each step of a flow and a last 0; (N + 1,), each one exact in float32.

    "trailing" is 1, 1 - 1/N … 1/N, as SiT and diffusers' Flux pipeline have it; "linspace" ends at sigma_min, as in
    diffusers' SD3 pipeline. "discrete" is "trailing" times 1 - 1/T of T training steps, as in diffusers' multistep
    schedulers. "integer" is training steps from T to 1, each rounded down, over T, as in diffusers' CogView4 pipeline.
    UniPC's "discrete" is 1/T above. The SDE's are even down to LAST_STEP; SCM's come from angles φ,
    σ = sin φ / (sin φ + cos φ). Then σ' = s σ / (1 + (s - 1) σ), where s = shift e^(shift_growth · N), and
    1 - σ'' = (1 - σ') (1 - shift_terminal) / (1 - σ' of the last step). A curve replaces all but both ends; times
    that are listed are σ as it is.
    """
    points = _single(_final_points(process, solver, steps, spacing))
    if (solver in MULTISTEP or listed(spacing)) and (np.diff(points) >= 0).any():
        raise UsageError(f"{steps} steps of {solver}: two σ are the same in float32; take fewer")
    return points


def flow_times(process: Process, solver: str, steps: int, spacing: str | None = None) -> NDArray[np.float64]:
    """Return what the network reads at each σ of a flow.

    It reads σ itself; ⌊T σ⌋ / T for "discrete"; σ before the shift for "integer".
    """
    points = _final_points(process, solver, steps, spacing)
    if solver in OWN_POINTS:
        return _single(points)
    base, bend = _base_and_curve(process, solver, spacing)
    if base == "discrete":
        points = np.floor(points * process.train_steps) / process.train_steps
    if base == "integer":
        if bend != "none" or listed(spacing):
            raise UsageError(
                f"spacing is {spacing or bend!r}; this network reads σ before its shift, so take 'integer'"
            )
        points = _even_points(process, solver, steps, spacing)
    return _single(points)


def listed(spacing: str | None) -> list[float]:
    """Return the times that a spacing lists; none where it is a name."""
    if not spacing or not spacing[0].isdigit():
        return []
    try:
        times = json.loads(f"[{spacing}]")
    except (ValueError, RecursionError):
        times = [None]
    if not all(is_number(time) for time in times) or any(after >= time for time, after in pairwise(times)):
        raise UsageError(f"spacing is {spacing!r}; expected a name, or falling times as in '999, 640, 300'")
    return list(map(float, times))


def _single(points: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.append(points, 0.0).astype(np.float32).astype(np.float64)


def _require_count(times: list[float], steps: int) -> None:
    if len(times) != steps:
        raise UsageError(f"steps is {steps}; expected {len(times)}, for spacing lists so many times")


def _final_points(process: Process, solver: str, steps: int, spacing: str | None) -> NDArray[np.float64]:
    """Return the σ before each step: those of the list, or the shifted ones, bent; (N,)."""
    require_fit(process, solver)
    require_steps(process, steps)
    if (times := listed(spacing)) and solver not in OWN_POINTS:
        _require_count(times, steps)
        if not 0 < times[-1] <= times[0] <= 1:
            raise UsageError(f"spacing is {spacing!r}; expected σ of a flow, from 1 down to above 0")
        points = np.array(times)
    else:
        points = _shifted_points(process, solver, steps, spacing)
        if solver not in OWN_POINTS:
            _, bend = _base_and_curve(process, solver, spacing)
            points = points if bend == "none" else curve(bend, points[0], points[-1], steps)
    return np.minimum(points, LARGEST) if SOLVERS[solver].get("multistep") in NEEDS_SIGNAL else points


def _shifted_points(process: Process, solver: str, steps: int, spacing: str | None) -> NDArray[np.float64]:
    own = OWN_POINTS.get(solver)
    points = own(steps, spacing) if own else _even_points(process, solver, steps, spacing)
    shift = process.shift_over(steps)
    shifted = shift * points / (1 + (shift - 1) * points)
    if process.shift_terminal is not None:
        if steps < 2:
            raise UsageError(f"steps is {steps}; expected at least 2, for shift_terminal is {process.shift_terminal}")
        shifted = 1 - (1 - shifted) / ((1 - shifted[-1]) / (1 - process.shift_terminal))
    return shifted


def _base_and_curve(process: Process, solver: str, spacing: str | None) -> tuple[str, str]:
    """Return the spacing that gives a flow's σ, or the ends of its curve, and the curve."""
    if not spacing:
        return process.sampler.flow_spacing, process.sampler.flow_curve
    if listed(spacing):
        return process.sampler.flow_spacing, "none"
    if spacing not in FLOW_SPACINGS:
        raise UsageError(f"spacing is {spacing!r} with solver {solver}; take one of {', '.join(FLOW_SPACINGS)}")
    return (process.sampler.flow_spacing, spacing) if spacing in CURVES else (spacing, "none")


def _even_points(process: Process, solver: str, steps: int, spacing: str | None) -> NDArray[np.float64]:
    base, _ = _base_and_curve(process, solver, spacing)
    if base == "linspace":
        return np.linspace(1, process.sigma_min, steps)
    if base == "discrete":  # in diffusers' order of operations: ⌊T σ⌋ depends on the last bit
        points = np.linspace(1, 1 / process.train_steps, steps + 1)
        return points[:-1] if SOLVERS[solver].get("multistep") == "unipc" else (1 - points)[:0:-1]
    if base == "integer":
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
    sigmas: NDArray[np.float64] = np.sin(angles) / (np.cos(angles) + np.sin(angles))
    return sigmas


OWN_POINTS = {"sde": _sde_points, "scm": _scm_points}  # of solvers that take no spacing


def _noise_steps(process: Process, solver: str, steps: int, spacing: str | None) -> list[Step]:
    """Return a noise process's steps.

    The level after a step is that of the next timestep, but for DDIM with the spacings of Lin et al.: there it is
    T // N training steps below, wherever the next timestep lies. On a curve, levels lie between those of timesteps.
    """
    levels, sampler = process.alpha_bar, process.sampler
    spacing = spacing or _default_spacing(sampler, solver)
    chosen = timesteps(process, solver, steps, spacing)
    method = SOLVERS[solver].get("multistep")
    if method:  # DEIS, a polynomial in log(σ/α), never ends at σ = 0
        final = 1.0 if sampler.final_sigmas_type == "zero" and method != "deis" else levels[0]
    else:
        final = 1.0 if solver == "ddpm" or sampler.set_alpha_to_one else levels[0]
    following = np.append(chosen[1:], -1)
    if solver == "ddim" and spacing in ("leading", "trailing", "linspace"):
        following = chosen - process.train_steps // steps

    def level(time: int) -> Level:
        bar = float(levels[time] if time >= 0 else final)
        return Level(float(time), math.sqrt(bar), math.sqrt(1 - bar))

    if spacing in CURVES:
        ratios = curve_ratios(process, spacing, steps)
        alphas = 1 / np.sqrt(1 + ratios * ratios)
        points = [Level(*map(float, values)) for values in zip(chosen, alphas, ratios * alphas, strict=True)]
        if final != 1 and steps > 1:
            points[-1] = level(-1)._replace(time=points[-1].time)  # the same number, so that the last step is none
        return [Step(*pair) for pair in pairwise([*points, level(-1)])]
    return [Step(level(now), level(after)) for now, after in zip(chosen.tolist(), following.tolist(), strict=True)]


def timesteps(process: Process, solver: str, steps: int, spacing: str | None = None) -> NDArray[np.int64]:
    """Return the training steps that a run visits, descending.

    "stride" and "respaced" are Nichol & Dhariwal 2021's (there "ddimN" and "N"); "leading", "trailing" and
    "linspace" are those of Lin et al. 2023, table 2. DPM-Solver++ divides the time into one interval a step, so
    its "leading" and "linspace" take N + 1 points and leave the last, t = 0, out; so do all multistep solvers. Curves
    bend σ/α between the ends of the training steps, and the network reads the step below: of "karras" the nearest one,
    but for DPM-Solver++ on cosine's betas, as in diffusers.
    """
    require_fit(process, solver)
    require_steps(process, steps)
    total, sampler = process.train_steps, process.sampler
    spacing = spacing or _default_spacing(sampler, solver)
    if times := listed(spacing):
        _require_count(times, steps)
        if not total > times[0] >= times[-1] >= 0 or any(time != int(time) for time in times):
            raise UsageError(f"spacing is {spacing!r}; expected training steps, from {total - 1} down to 0")
        return np.array(times).astype(np.int64)
    if spacing not in SPACINGS:
        close = nearest(str(spacing), SPACINGS)
        raise UsageError(f"spacing {spacing!r} is not known{close}; known: {', '.join(SPACINGS)}")

    if spacing in CURVES:
        places = np.interp(
            np.log(curve_ratios(process, spacing, steps)), np.log(training_ratios(process)), np.arange(total)
        )
        steep = process.beta_schedule == "squaredcos_cap_v2" and SOLVERS[solver].get("multistep") in CLIPPED
        if spacing == "karras" and not steep:
            return places.round().astype(np.int64)
        return np.floor(places).astype(np.int64)

    multistep = solver in MULTISTEP
    end = _count_unclipped(process) if SOLVERS[solver].get("multistep") in CLIPPED else total
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
