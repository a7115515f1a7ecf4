"""What a model was trained with (Diffusion), how it is sampled unless asked otherwise (Sampler), and a run's steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import BundleError, UsageError, nearest

ORDERS = {"dpm++1": 1, "dpm++": 2, "dpm++3": 3}  # of the DPM-Solver++ family
NOISE_SOLVERS = ("ddpm", "ddim", *ORDERS)  # from level to level of a noise schedule
FLOW_SOLVERS = ("euler", "heun", "sde")  # along a velocity, in continuous time
SOLVERS = (*NOISE_SOLVERS, *FLOW_SOLVERS)
PREDICTIONS = {  # what a network may predict, and the solvers that fit
    "epsilon": NOISE_SOLVERS,
    "v_prediction": NOISE_SOLVERS,
    "sample": NOISE_SOLVERS,
    "velocity": FLOW_SOLVERS,  # x₀ - ε on the straight line t x₀ + (1 - t) ε (SiT, Ma et al. 2024)
}
SPACINGS = ("stride", "respaced", "leading", "trailing", "linspace")
CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction": tuple(PREDICTIONS),
    "solver": SOLVERS,
    "ddpm_spacing": SPACINGS,
    "ddim_spacing": SPACINGS,
    "dpm_spacing": SPACINGS,
    "variance": ("fixed_small", "fixed_large", "learned", "learned_range"),
    "solver_type": ("midpoint", "heun"),
    "final_sigmas_type": ("zero", "sigma_min"),
}


@dataclass(frozen=True)
class Sampler:
    """How a model is sampled unless asked otherwise."""

    solver: str = "ddim"
    ddpm_spacing: str = "respaced"
    ddim_spacing: str = "stride"
    dpm_spacing: str = "linspace"
    steps_offset: int = 0  # added to the timesteps of "leading"
    # DDPM and DDIM
    clip_sample: bool = False  # clamp the predicted x_0 to ± clip_sample_range
    clip_sample_range: float = 1.0
    # DDIM
    set_alpha_to_one: bool = True  # the run ends at ᾱ = 1, else at the schedule's first ᾱ
    # DDPM
    variance: str = "learned_range"  # "learned": the network gives σ² itself; "learned_range": v in [-1, 1]
    # DPM-Solver++
    solver_type: str = "midpoint"  # of its second-order steps
    lower_order_final: bool = True  # the last two steps of a run of fewer than 15 are of order 2 and 1
    euler_at_final: bool = False  # the last step is of order 1
    final_sigmas_type: str = "zero"  # the run ends at σ = 0, else at the schedule's smallest σ
    lambda_min_clipped: float | None = None  # timesteps whose log(α/σ) is smaller are left out

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(self.steps_offset >= 0, "steps_offset", self.steps_offset, "0 or more")
        _require(self.clip_sample_range > 0, "clip_sample_range", self.clip_sample_range, "a number above 0")


@dataclass(frozen=True)
class Diffusion:
    """The forward process a model was trained with: the manifest's `diffusion` section."""

    train_steps: int = 1000  # also the most that a run may take
    beta_schedule: str = "linear"  # of the noise schedule, as the two below; a velocity has none
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = None  # instead of the three fields above
    prediction: str = "epsilon"
    sampler: Sampler = field(default_factory=Sampler)

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(self.train_steps > 1, "train_steps", self.train_steps, "2 or more")
        _require(0 < self.beta_start < 1, "beta_start", self.beta_start, "a number between 0 and 1")
        _require(0 < self.beta_end < 1, "beta_end", self.beta_end, "a number between 0 and 1")
        if self.trained_betas is not None:
            count = len(self.trained_betas)
            _require(count == self.train_steps, "trained_betas", f"{count} values", f"{self.train_steps}")
            for beta in self.trained_betas:
                _require(_is_number(beta) and 0 < beta < 1, "trained_betas", beta, "numbers between 0 and 1")
        require_fit(self, self.sampler.solver)

    @property
    def span(self) -> float:
        """The range of the network's t, from 0."""
        return 1.0 if self.prediction == "velocity" else float(self.train_steps)

    @property
    def betas(self) -> NDArray[np.float64]:
        """β of each training step: Ho et al. 2020 (linear), Rombach et al. 2022 (scaled), Nichol & Dhariwal 2021 (cos).

        Only + - × ÷ √ in float64, cosine apart: so every machine gets the same bits. A velocity has none.
        """
        if self.prediction == "velocity":
            return np.empty(0)
        if self.trained_betas is not None:
            return np.array(self.trained_betas, np.float64)
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, self.train_steps)
        if self.beta_schedule == "scaled_linear":
            return np.square(np.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), self.train_steps))
        time = np.arange(self.train_steps + 1) / self.train_steps
        level: NDArray[np.float64] = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - level[1:] / level[:-1], 0.999)

    @property
    def alpha_bar(self) -> NDArray[np.float64]:
        """ᾱ_t = Π (1 - β_s) over s ≤ t."""
        return np.cumprod(1 - self.betas, dtype=np.float64)

    def to_dict(self) -> dict[str, Any]:
        """As the manifest holds it."""
        table = asdict(self)
        table["trained_betas"] = None if self.trained_betas is None else list(self.trained_betas)
        return table

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Diffusion:
        _known_keys(cls, "diffusion", table)
        values = dict(table)
        try:
            if "sampler" in values:
                _known_keys(Sampler, "diffusion.sampler", values["sampler"])
                values["sampler"] = Sampler(**values["sampler"])
            if isinstance(values.get("trained_betas"), list):
                values["trained_betas"] = tuple(values["trained_betas"])
            return cls(**values)
        except BundleError:
            raise
        except UsageError as error:
            raise BundleError(f"diffusion: {error}") from None


class Schedule(NamedTuple):
    """A run's steps, noisiest first; a step leads from ᾱ to ᾱ_prev."""

    timesteps: NDArray[np.int64]  # (N,)
    alpha_bar: NDArray[np.float64]  # (N,)
    alpha_bar_prev: NDArray[np.float64]  # (N,)


def timesteps(diffusion: Diffusion, solver: str, steps: int, spacing: str | None = None) -> NDArray[np.int64]:
    """The training steps that a run visits, descending.

    "stride" and "respaced" are Nichol & Dhariwal 2021's (there "ddimN" and "N"); "leading", "trailing" and
    "linspace" are those of Lin et al. 2023, table 2. DPM-Solver++ divides the time into one interval a step, so
    its "leading" and "linspace" take N + 1 points and leave the last, t = 0, out.
    """
    require_fit(diffusion, solver)
    require_steps(diffusion, steps)
    total, sampler = diffusion.train_steps, diffusion.sampler
    spacing = spacing or _default_spacing(sampler, solver)
    if spacing not in SPACINGS:
        close = nearest(str(spacing), SPACINGS)
        raise UsageError(f"spacing {spacing!r} is not known{close}; known: {', '.join(SPACINGS)}")

    multistep = solver in ORDERS
    end = _count_unclipped(diffusion) if multistep else total
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


def make_schedule(diffusion: Diffusion, solver: str, steps: int, spacing: str | None = None) -> Schedule:
    """A run's timesteps with the noise level before and after each.

    The level after a step is that of the next timestep, but for DDIM with the spacings of Lin et al.: there it is
    T // N training steps below, wherever the next timestep lies.
    """
    chosen = timesteps(diffusion, solver, steps, spacing)
    levels, sampler = diffusion.alpha_bar, diffusion.sampler
    if solver in ORDERS:
        final = 1.0 if sampler.final_sigmas_type == "zero" else levels[0]
    else:
        final = 1.0 if solver == "ddpm" or sampler.set_alpha_to_one else levels[0]
    previous = np.append(chosen[1:], -1)
    if solver == "ddim" and (spacing or sampler.ddim_spacing) in ("leading", "trailing", "linspace"):
        previous = chosen - diffusion.train_steps // steps
    return Schedule(chosen, levels[chosen], np.where(previous >= 0, levels[previous], final))


def require_fit(diffusion: Diffusion, solver: str) -> None:
    """Refuses a solver that is not known, or that wants another prediction than this model's."""
    if solver not in SOLVERS:
        raise UsageError(f"solver {solver!r} is not known{nearest(str(solver), SOLVERS)}; known: {', '.join(SOLVERS)}")
    if solver not in PREDICTIONS[diffusion.prediction]:
        fit = ", ".join(PREDICTIONS[diffusion.prediction])
        raise UsageError(
            f"solver {solver!r} does not fit a model that predicts {diffusion.prediction}; take one of {fit}"
        )


def require_steps(diffusion: Diffusion, steps: int) -> None:
    if not is_integer(steps) or not 0 < steps <= diffusion.train_steps:
        most = diffusion.train_steps
        raise UsageError(f"steps is {steps!r}; expected an integer from 1 to {most}, the training steps")


def log_snr(alpha_bar: float) -> float:
    """λ = log(α/σ), half the logarithm of the signal-to-noise ratio; ∞ without noise."""
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar)) if alpha_bar < 1 else math.inf


def is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _default_spacing(sampler: Sampler, solver: str) -> str:
    if solver in ORDERS:
        return sampler.dpm_spacing
    return sampler.ddpm_spacing if solver == "ddpm" else sampler.ddim_spacing


def _count_unclipped(diffusion: Diffusion) -> int:
    floor = diffusion.sampler.lambda_min_clipped
    return diffusion.train_steps if floor is None else sum(log_snr(level) >= floor for level in diffusion.alpha_bar)


def _stride(total: int, steps: int) -> int:
    """The smallest integer stride that visits exactly `steps` of the training steps."""
    strides = {len(range(0, total, stride)): stride for stride in range(total - 1, 0, -1)}
    if steps not in strides:
        near = sorted(sorted(strides, key=lambda count: abs(count - steps))[:2])
        raise UsageError(
            f"{steps} steps have no integer stride in {total} training steps; the nearest that do: "
            f"{' and '.join(map(str, near))} (or take spacing 'respaced')"
        )
    return strides[steps]


def _known_keys(cls: type, where: str, table: object) -> None:
    known = [entry.name for entry in fields(cls)]
    if not isinstance(table, Mapping):
        raise BundleError(f"{where} is {table!r}; expected a table of {', '.join(known)}")
    for key in table:
        if key not in known:
            raise BundleError(f"{where}: unknown key {key!r}{nearest(str(key), known)}; known: {', '.join(known)}")


def _check_fields(record: Any) -> None:
    """Every field against its annotation and CHOICES."""
    expected = {
        "bool": (lambda value: isinstance(value, bool), "true or false"),
        "int": (is_integer, "an integer"),
        "float": (_is_number, "a finite number"),
        "float | None": (lambda value: value is None or _is_number(value), "a finite number or nothing"),
        "tuple[float, ...] | None": (lambda value: value is None or isinstance(value, tuple), "numbers or nothing"),
        "Sampler": (lambda value: isinstance(value, Sampler), "a Sampler"),
    }
    for entry in fields(record):
        value = getattr(record, entry.name)
        if entry.name in CHOICES:
            known = CHOICES[entry.name]
            _require(value in known, entry.name, value, f"one of {', '.join(known)}")
        else:
            fits, words = expected[str(entry.type)]
            _require(fits(value), entry.name, value, words)


def _require(fits: bool, name: str, value: object, expected: str) -> None:
    if not fits:
        raise UsageError(f"{name} is {value!r}; expected {expected}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
