"""Read a diffusers scheduler_config.json: every field is honoured or refused, none is ignored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dit_runtime.errors import UsageError, nearest
from dit_runtime.sampling.process import CHOICES, CURVES, PREDICTIONS, Process, Sampler, solver_of_order

FLOW, SCM = "FlowMatchEulerDiscreteScheduler", "SCMScheduler"
DPM, UNIPC, DEIS = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"
CLASSES = ("DDIMScheduler", "DDPMScheduler", DPM, UNIPC, DEIS, FLOW, SCM)
CLIPPING = ("DDIMScheduler", "DDPMScheduler")  # the classes that have clip_sample
# Fields that the classes share, or that only one has; a config keeps another class's fields for a switch back.
PROCESS = {
    "num_train_timesteps": "train_steps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "beta_schedule": "beta_schedule",
    "prediction_type": "prediction",
}
SAMPLER = (
    "steps_offset",
    "clip_sample",
    "clip_sample_range",
    "set_alpha_to_one",
    "lower_order_final",
    "euler_at_final",
    "final_sigmas_type",
)
VARIANCES = {  # the two logs are the same numbers, kept as logarithms
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned": "learned",
    "learned_range": "learned_range",
}
LIN_SPACINGS = ("leading", "trailing", "linspace")
ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "deis")  # diffusers takes the last for the first
SOLVER_TYPES = (*CHOICES["solver_type"], "logrho")  # each class takes those of another for its own default
CURVE_SWITCHES = {f"use_{name}_sigmas": name for name in CURVES}
ONLY = {  # what we do not implement passes where it is switched off
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "predict_x0": True,
    "disable_corrector": [],
    "solver_p": None,
    "sigma_min": None,
    "sigma_max": None,
    "shift_terminal": None,
}
# Without effect while their switch above is off.
IDLE = ("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type")
ORDERS = tuple(solver_of_order("dpm++"))
SPECIAL = ("trained_betas", "timestep_spacing", "variance_type", "solver_order", "lambda_min_clipped")
FLOW_ONLY: dict[str, tuple[Any, ...]] = {
    "use_dynamic_shifting": (False, True),
    "time_shift_type": ("exponential", "linear"),
    "invert_sigmas": (False,),
    **dict.fromkeys(CURVE_SWITCHES, (False, True)),
    "stochastic_sampling": (False,),
}
# A flow's multistep solver: fields that are read, and those without effect while its σ do not come from betas.
MULTISTEP_FLOW = ("num_train_timesteps", "flow_shift", "lower_order_final", "euler_at_final")
MULTISTEP_FLOW_IDLE = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "timestep_spacing",
    "steps_offset",
    "lambda_min_clipped",
    "variance_type",
    "clip_sample",
    "clip_sample_range",
    "set_alpha_to_one",
)
LARGEST_MU = 50
DYNAMIC = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}


def read_scheduler_config(
    config: Mapping[str, Any] | None,
    *,
    learned_variance: bool = True,
    prediction: str | None = None,
    tokens: int | None = None,
    spacing: str | None = None,
    mu: Callable[[int, Mapping[str, float]], tuple[float, float]] | None = None,
) -> Process:
    """Return the process and its sampling defaults; without a config, those of Meta's code, for DiT or for SiT.

    The config's class gives the solver. Every other solver takes the fields that the config names and diffusers'
    defaults for the rest, with two exceptions, because those defaults are made for pixels and for networks without a
    variance: latents are clipped, and a learned variance is left unused, only where the config says so in words.
    A flow's config does not say what its pipeline does: `tokens` is the count of image tokens that a dynamic shift
    depends on, and `spacing` that of its timesteps. `mu` maps the tokens and the fields of `read_dynamic` to
    the pipeline's own μ: its value for 0 steps, and what each step adds; without it, μ is that of `dynamic_mu`.
    """
    if config is None:
        solver = "euler" if prediction == "velocity" else "ddim"
        variance = "learned_range" if learned_variance else "fixed_large"
        return Process(prediction=prediction or "epsilon", sampler=Sampler(solver=solver, variance=variance))
    name = config.get("_class_name")
    if name not in CLASSES:
        raise UsageError(
            f"scheduler config: class {name!r} is not supported{nearest(str(name), CLASSES)}; "
            f"supported: {', '.join(CLASSES)} (save one of these with from_config)"
        )
    defaulted = config.get("_use_default_values", ())  # in a live scheduler's config: what its JSON did not say
    if not isinstance(defaulted, list | tuple):
        raise UsageError(f"scheduler config: _use_default_values is {defaulted!r}; expected a list of fields")
    said = {key: value for key, value in config.items() if key not in defaulted and not key.startswith("_")}
    multistep_flow = name in (DPM, UNIPC) and said.get("use_flow_sigmas") is True
    predicted = "velocity" if name in (FLOW, SCM) or multistep_flow else said.get("prediction_type", "epsilon")
    try:
        if multistep_flow:
            process = _read_multistep_flow(name, said)
        elif name == SCM:
            process = _read_scm(said)
        elif name == FLOW:
            process = _read_flow(said, tokens, spacing, mu)
        else:
            process = _read_noise(name, said, learned_variance)
    except UsageError as error:
        raise UsageError(f"scheduler config: {error}") from None
    if prediction not in (None, predicted):
        raise UsageError(f"prediction {prediction!r} was asked for, but the scheduler config says {predicted!r}")
    return process


def _read_noise(name: str, said: dict[str, Any], learned_variance: bool) -> Process:
    if name not in CLIPPING:
        said.pop("clip_sample", None)  # a leftover of the class that this config was made from
    _refuse_unsupported(said, {*PROCESS, *SAMPLER, *IDLE, *SPECIAL}, _supported(learned_variance))
    spacing, curve = said.get("timestep_spacing"), _curve(said)
    clipped = said.get("lambda_min_clipped")
    betas = said.get("trained_betas")
    sampler = Sampler(
        solver={"DDIMScheduler": "ddim", "DDPMScheduler": "ddpm"}.get(name) or _multistep(name, said),
        ddpm_spacing=spacing or "leading",
        ddim_spacing=spacing or "leading",
        dpm_spacing=curve or spacing or "linspace",
        solver_type=_solver_type(said),
        variance=VARIANCES[said.get("variance_type") or ("learned_range" if learned_variance else "fixed_small")],
        lambda_min_clipped=None if clipped == -math.inf else clipped,
        **{key: said[key] for key in SAMPLER if key in said},
    )
    return Process(
        trained_betas=tuple(betas) if isinstance(betas, list) else betas,
        sampler=sampler,
        **{ours: said[theirs] for theirs, ours in PROCESS.items() if theirs in said},
    )


def _read_flow(
    said: dict[str, Any],
    tokens: int | None,
    spacing: str | None,
    own_mu: Callable[[int, Mapping[str, float]], tuple[float, float]] | None,
) -> Process:
    """Return a flow whose dynamic shift is settled, because a bundle has one size.

    exponential: e^μ / (e^μ + 1/σ - 1),  linear: μ / (μ + 1/σ - 1): the static shift by e^μ, or by μ.
    """
    _refuse_unsupported(said, {"num_train_timesteps", "shift", "shift_terminal", *DYNAMIC}, FLOW_ONLY)
    train_steps, dynamic = said.get("num_train_timesteps", 1000), said.get("use_dynamic_shifting", False)
    growth = 0.0
    if dynamic:
        if tokens is None:
            raise UsageError("use_dynamic_shifting = True needs the count of image tokens, which is not stated")
        mu, growth = own_mu(tokens, read_dynamic(said)) if own_mu else (dynamic_mu(said, tokens), 0.0)
        if abs(mu) > LARGEST_MU:
            raise UsageError(f"the dynamic shift's μ is {mu:g}; expected at most {LARGEST_MU} either way")
        exponential = said.get("time_shift_type", "exponential") == "exponential"
        if growth and not exponential:
            raise UsageError("time_shift_type = 'linear' is not supported where μ depends on the number of steps")
        shift = math.exp(mu) if exponential else mu
    else:
        shift = said.get("shift", 1.0)
    process = Process(
        prediction="velocity",
        train_steps=train_steps,
        shift=shift,
        shift_growth=growth,
        shift_terminal=said.get("shift_terminal") or None,
        sampler=Sampler(
            solver="euler",
            flow_spacing=spacing or ("trailing" if dynamic else "linspace"),
            flow_curve=_curve(said) or "none",
        ),
    )
    # diffusers shifts its smallest σ when it is made, unless the shift is dynamic, and again with a run's others.
    smallest = np.float32(1 / train_steps)
    if not dynamic:
        smallest = np.float32(shift) * smallest / (1 + np.float32(shift - 1) * smallest)
    return replace(process, sigma_min=float(smallest))


def _read_multistep_flow(name: str, said: dict[str, Any]) -> Process:
    """Return the flow of a multistep class with use_flow_sigmas: its own σ, where the network reads a training step."""
    terminal = said.pop("shift_terminal", None) if name == UNIPC else None
    fixed: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in ONLY.items()} | {
        **dict.fromkeys(CURVE_SWITCHES, (False,)),  # diffusers' are those of betas
        "algorithm_type": ALGORITHMS,
        "use_flow_sigmas": (True,),
        "prediction_type": ("flow_prediction",),
        "final_sigmas_type": ("zero",),
        "solver_order": ORDERS,
        "solver_type": SOLVER_TYPES,
    }
    said = {"prediction_type": "epsilon"} | said
    _refuse_unsupported(said, {*MULTISTEP_FLOW, *MULTISTEP_FLOW_IDLE, *IDLE}, fixed)
    switches = ("lower_order_final", "euler_at_final")
    return Process(
        prediction="velocity",
        train_steps=said.get("num_train_timesteps", 1000),
        shift=said.get("flow_shift", 1.0),
        shift_terminal=terminal or None,
        sampler=Sampler(
            solver=_multistep(name, said),
            flow_spacing="discrete",
            solver_type=_solver_type(said),
            **{key: said[key] for key in switches if key in said},
        ),
    )


def _read_scm(said: dict[str, Any]) -> Process:
    """Return the flow of a consistency network: its angles are a flow's σ, and sigma_data scales its latents alone."""
    _refuse_unsupported(said, {"num_train_timesteps", "sigma_data"}, {"prediction_type": ("trigflow",)})
    return Process(
        prediction="velocity", train_steps=said.get("num_train_timesteps", 1000), sampler=Sampler(solver="scm")
    )


def _multistep(name: str, said: Mapping[str, Any]) -> str:
    noisy = name == DPM and said.get("algorithm_type") == "sde-dpmsolver++"
    method = {UNIPC: "unipc", DEIS: "deis"}.get(name) or ("sde-dpm++" if noisy else "dpm++")
    order, solvers = said.get("solver_order", 2), solver_of_order(method)
    if method == "deis":
        solvers = solver_of_order("dpm++") | solvers  # of order 1 both are DDIM
    if order not in solvers:
        known = ", ".join(map(str, solvers))
        raise UsageError(f"solver_order = {order!r} is not supported with {method} (supported: {known})")
    return solvers[order]


def _solver_type(said: Mapping[str, Any]) -> str:
    kind = said.get("solver_type", "midpoint")
    return "midpoint" if kind == "logrho" else kind


def _curve(said: Mapping[str, Any]) -> str | None:
    curves = [name for switch, name in CURVE_SWITCHES.items() if said.get(switch)]
    if len(curves) > 1:
        raise UsageError(f"use_{curves[0]}_sigmas and use_{curves[1]}_sigmas are both True; expected one at most")
    return curves[0] if curves else None


def read_dynamic(said: Mapping[str, Any]) -> dict[str, float]:
    """Return the fields of a dynamic shift, diffusers' defaults where the config lacks one."""
    fields = {key: said.get(key, value) for key, value in DYNAMIC.items()}
    for key, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"{key} is {value!r}; expected a finite number")
    return fields


def dynamic_mu(said: Mapping[str, Any], tokens: int) -> float:
    """Return μ as diffusers' calculate_shift: linear in the count of image tokens."""
    base_shift, max_shift, base_tokens, max_tokens = read_dynamic(said).values()
    if base_tokens == max_tokens:
        raise UsageError(f"base_image_seq_len and max_image_seq_len are both {max_tokens!r}; expected two numbers")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return float(tokens * slope + (base_shift - slope * base_tokens))


def _supported(learned_variance: bool) -> dict[str, tuple[Any, ...]]:
    """Return the values that are supported, for each field of a noise process that is not free."""
    supported: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in ONLY.items()}
    supported |= {key: CHOICES[ours] for key, ours in PROCESS.items() if ours in CHOICES}
    supported |= {key: CHOICES[key] for key in SAMPLER if key in CHOICES}
    supported["prediction_type"] = tuple(name for name, kind in PREDICTIONS.items() if kind == "noise")
    supported |= {"timestep_spacing": LIN_SPACINGS, "solver_order": ORDERS, "solver_type": SOLVER_TYPES}
    supported |= {"algorithm_type": ALGORITHMS} | dict.fromkeys(CURVE_SWITCHES, (False, True))
    supported["variance_type"] = (None, *(key for key in VARIANCES if learned_variance or "learned" not in key))
    return supported


def _refuse_unsupported(said: Mapping[str, Any], free: set[str], supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse, in one line, every field that would have to be ignored."""
    known, problems = free | supported.keys(), []
    for key, value in said.items():
        if key not in known:
            problems.append(f"{key} = {value!r} is not known{nearest(key, known)}")
        elif key in supported and value not in supported[key]:
            problems.append(f"{key} = {value!r} is not supported (supported: {', '.join(map(str, supported[key]))})")
    if problems:
        raise UsageError("; ".join(problems))
