"""The forward process x = α x₀ + σ ε that a model was trained with (Process), and its sampling defaults (Sampler).

A noise process has the betas of a discrete schedule and predicts ε, v or x₀ at a training step t. A flow has
α = 1 - σ with σ from 1 (noise) to 0 (data) and predicts the velocity dx/dσ = ε - x₀ at the time σ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import BundleError, UsageError, nearest
from dit_runtime.facts import DEFAULT_STEPS, FACTS, LIMITS

# name -> kinds of process, order, evaluations a step, and the method of those that read predictions of earlier steps
SOLVERS: dict[str, dict[str, Any]] = FACTS["solvers"]
NOISE_SOLVERS = tuple(name for name, facts in SOLVERS.items() if "noise" in facts["processes"])
FLOW_SOLVERS = tuple(name for name, facts in SOLVERS.items() if "flow" in facts["processes"])
MULTISTEP = tuple(name for name, facts in SOLVERS.items() if facts.get("multistep"))
PREDICTIONS: dict[str, str] = FACTS["predictions"]  # name -> kind of process
SPACINGS = tuple(FACTS["spacings"]["noise"])
FLOW_SPACINGS = tuple(FACTS["spacings"]["flow"])
CURVES = tuple(FACTS["curves"])  # the spacings that bend σ between two ends
CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction": tuple(PREDICTIONS),
    "solver": tuple(SOLVERS),
    "ddpm_spacing": SPACINGS,
    "ddim_spacing": SPACINGS,
    "dpm_spacing": SPACINGS,
    "flow_spacing": tuple(name for name in FLOW_SPACINGS if name not in CURVES),
    "flow_curve": ("none", *CURVES),
    "variance": ("fixed_small", "fixed_large", "learned", "learned_range"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2"),
    "final_sigmas_type": ("zero", "sigma_min"),
}
FLOW_FIELDS = ("train_steps", "shift", "shift_growth", "shift_terminal", "sigma_min", "sampler")
GREATEST_GROWTH = 100.0  # of the shift's logarithm, over as many steps as a run may take: float64 holds e^100
FLOW_SAMPLER_FIELDS = (
    "solver",
    "steps",
    "solver_type",
    "lower_order_final",
    "euler_at_final",
    "flow_spacing",
    "flow_curve",
)


@dataclass(frozen=True)
class Sampler:
    """A model's sampling defaults, used unless a caller overrides them."""

    solver: str = "ddim"
    steps: int = DEFAULT_STEPS
    # Noise processes
    ddpm_spacing: str = "respaced"
    ddim_spacing: str = "stride"
    dpm_spacing: str = "linspace"
    steps_offset: int = 0  # added to the timesteps of "leading"
    # DDPM and DDIM
    clip_sample: bool = False  # clamp the predicted x₀ to ± clip_sample_range
    clip_sample_range: float = 1.0
    # DDIM
    set_alpha_to_one: bool = True  # the run ends at ᾱ = 1, else at the schedule's first ᾱ
    # DDPM
    variance: str = "learned_range"  # "learned": the network gives σ² itself; "learned_range": v in [-1, 1]
    # Multistep solvers
    solver_type: str = "midpoint"  # of DPM-Solver++: "heun", else midpoint; of UniPC: "bh1", else bh2
    lower_order_final: bool = True  # the last two steps of a run of fewer than 15, UniPC's of any, are of order 2 and 1
    euler_at_final: bool = False  # the last step of DPM-Solver++ is of order 1
    final_sigmas_type: str = "zero"  # the run ends at σ = 0, else, and with DEIS, at the schedule's smallest σ
    lambda_min_clipped: float | None = None  # timesteps whose log(α/σ) is smaller are left out
    # Flows
    flow_spacing: str = "trailing"
    flow_curve: str = "none"  # bends the σ of the spacing, which keeps its ends

    def __post_init__(self) -> None:
        _check_fields(self)
        most = LIMITS["steps"]
        _require(1 <= self.steps <= most, "steps", self.steps, f"an integer from 1 to {most}")
        _require(0 <= self.steps_offset <= most, "steps_offset", self.steps_offset, f"an integer from 0 to {most}")
        _require(self.clip_sample_range > 0, "clip_sample_range", self.clip_sample_range, "a number above 0")


@dataclass(frozen=True)
class Process:
    """The manifest's `process` section; a flow holds FLOW_FIELDS alone, a noise process the other fields."""

    train_steps: int = 1000  # also the most that a run may take
    prediction: str = "epsilon"
    sampler: Sampler = field(default_factory=Sampler)
    # Noise processes
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = None  # instead of the three fields above
    # Flows: σ' = s σ / (1 + (s - 1) σ) (Esser et al. 2024, equation 23)
    shift: float = 1.0
    shift_growth: float = 0.0  # a run of N steps has the shift s e^(growth · N)
    shift_terminal: float | None = None  # stretch the shifted σ so that a run's last one is this
    sigma_min: float = 0.001  # where the spacing "linspace" ends, before the shift

    def __post_init__(self) -> None:
        _check_fields(self)
        fraction, most = "a number between 0 and 1", LIMITS["steps"]
        _require(2 <= self.train_steps <= most, "train_steps", self.train_steps, f"an integer from 2 to {most}")
        _require(0 < self.beta_start < 1, "beta_start", self.beta_start, fraction)
        _require(0 < self.beta_end < 1, "beta_end", self.beta_end, fraction)
        _require(self.shift > 0, "shift", self.shift, "a number above 0")
        growth = GREATEST_GROWTH / self.train_steps
        _require(abs(self.shift_growth) <= growth, "shift_growth", self.shift_growth, f"at most {growth:g} either way")
        _require(0 < self.sigma_min < 1, "sigma_min", self.sigma_min, fraction)
        if self.shift_terminal is not None:
            _require(0 < self.shift_terminal < 1, "shift_terminal", self.shift_terminal, fraction)
        if self.trained_betas is not None:
            count = len(self.trained_betas)
            _require(count == self.train_steps, "trained_betas", f"{count} values", f"{self.train_steps}")
            for beta in self.trained_betas:
                _require(is_number(beta) and 0 < beta < 1, "trained_betas", beta, "numbers between 0 and 1")
        require_fit(self, self.sampler.solver)
        if self.kind == "noise":
            levels = self.alpha_bar
            if levels[0] == 1:
                raise UsageError("the betas add no noise at the first step")
            if levels[-1] == 0:
                raise UsageError("the betas leave no signal at the last step")

    @property
    def kind(self) -> str:
        """ "noise" or "flow"."""
        return PREDICTIONS[self.prediction]

    @property
    def span(self) -> float:
        """The range of the network's time, from 0."""
        return 1.0 if self.kind == "flow" else float(self.train_steps)

    @property
    def betas(self) -> NDArray[np.float64]:
        """β of each training step: Ho et al. 2020 (linear), Rombach et al. 2022 (scaled), Nichol & Dhariwal 2021 (cos).

        Only + - × ÷ √ in float64, cosine apart: so every machine gets the same bits. A flow has none.
        """
        if self.kind == "flow":
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

    def shift_over(self, steps: int) -> float:
        """Return the shift of a run of so many steps."""
        return self.shift * math.exp(self.shift_growth * steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest's table."""
        known, known_of_sampler = _known(self.kind)
        table = {"kind": self.kind} | {key: value for key, value in asdict(self).items() if key in known}
        table["sampler"] = {key: value for key, value in table["sampler"].items() if key in known_of_sampler}
        if self.trained_betas is not None:
            table["trained_betas"] = list(self.trained_betas)
        return table

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Process:
        kind = table.get("kind", "noise") if isinstance(table, Mapping) else "noise"
        if kind not in ("noise", "flow"):
            raise BundleError(f"process: kind is {kind!r}; expected one of noise, flow")
        known, known_of_sampler = _known(kind)
        _check_keys("process", table, ("kind", *known))
        values = {key: value for key, value in table.items() if key != "kind"}
        if kind == "flow":
            values = {"prediction": "velocity", "sampler": {}} | values
        try:
            if "sampler" in values:
                _check_keys("process.sampler", values["sampler"], known_of_sampler)
                values["sampler"] = Sampler(**({"solver": "euler"} if kind == "flow" else {}) | values["sampler"])
            if isinstance(values.get("trained_betas"), list):
                values["trained_betas"] = tuple(values["trained_betas"])
            process = cls(**values)
        except BundleError:
            raise
        except UsageError as error:
            raise BundleError(f"process: {error}") from None
        if process.kind != kind:
            raise BundleError(
                f"process: prediction is {process.prediction!r}, which fits kind {process.kind}, not {kind}"
            )
        return process


def require_fit(process: Process, solver: str) -> None:
    """Refuse a solver that is not known, or that is made for the other kind of process."""
    if solver not in SOLVERS:
        raise UsageError(f"solver {solver!r} is not known{nearest(str(solver), SOLVERS)}; known: {', '.join(SOLVERS)}")
    if process.kind not in SOLVERS[solver]["processes"]:
        fit = ", ".join(FLOW_SOLVERS if process.kind == "flow" else NOISE_SOLVERS)
        raise UsageError(
            f"solver {solver!r} does not fit a model that predicts {process.prediction}; take one of {fit}"
        )


def solver_of_order(method: str) -> dict[int, str]:
    """Return the solvers of one multistep method, by their order."""
    return {facts["order"]: name for name, facts in SOLVERS.items() if facts.get("multistep") == method}


def require_steps(process: Process, steps: int) -> None:
    if not is_integer(steps) or not 0 < steps <= process.train_steps:
        most = process.train_steps
        raise UsageError(f"steps is {steps!r}; expected an integer from 1 to {most}, the training steps")


def is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether this is a number that float64 holds; JSON's integers may have any number of digits."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _known(kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the fields of a process of this kind, and those of its sampler."""
    if kind == "flow":
        return FLOW_FIELDS, FLOW_SAMPLER_FIELDS
    flow_only = {"shift", "shift_growth", "shift_terminal", "sigma_min", "flow_spacing", "flow_curve"}
    names = [tuple(entry.name for entry in fields(cls) if entry.name not in flow_only) for cls in (Process, Sampler)]
    return names[0], names[1]


def _check_keys(where: str, table: object, known: tuple[str, ...]) -> None:
    if not isinstance(table, Mapping):
        raise BundleError(f"{where} is {table!r}; expected a table of {', '.join(known)}")
    for key in table:
        if key not in known:
            raise BundleError(f"{where}: unknown key {key!r}{nearest(str(key), known)}; known: {', '.join(known)}")


def _check_fields(record: Any) -> None:
    """Check every field against its annotation and CHOICES."""
    expected: dict[str, tuple[Callable[[Any], bool], str]] = {
        "bool": (lambda value: isinstance(value, bool), "true or false"),
        "int": (is_integer, "an integer"),
        "float": (is_number, "a finite number"),
        "float | None": (lambda value: value is None or is_number(value), "a finite number or nothing"),
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
