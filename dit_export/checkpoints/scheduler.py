"""Reads a diffusers scheduler_config.json: every field is honoured or refused, none is ignored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dit_runtime.errors import UsageError, nearest
from dit_runtime.sampling.schedule import CHOICES, NOISE_SOLVERS, ORDERS, PREDICTIONS, Diffusion, Sampler

CLASSES = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler")
CLIPPING = ("DDIMScheduler", "DDPMScheduler")  # the classes that have clip_sample
# Fields that the classes share, or that only one has; a config keeps another class's fields for a switch back.
DIFFUSION = {
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
    "solver_type",
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
ONLY = {  # what we do not implement passes where it is switched off
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "algorithm_type": "dpmsolver++",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
}
# Without effect while their switch above is off.
IDLE = ("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type")
SPECIAL = ("trained_betas", "timestep_spacing", "variance_type", "solver_order", "lambda_min_clipped")


def read_scheduler_config(
    config: Mapping[str, Any] | None, *, learned_variance: bool = True, prediction: str | None = None
) -> Diffusion:
    """The diffusion and its sampling defaults; without a config, those of Meta's code, for DiT or for SiT.

    The config's class gives the solver. Every other solver takes the fields that the config names and diffusers'
    defaults for the rest, with two exceptions, because those defaults are made for pixels and for networks without a
    variance: latents are clipped, and a learned variance is left unused, only where the config says so in words.
    """
    if config is None:
        solver = "euler" if prediction == "velocity" else "ddim"
        variance = "learned_range" if learned_variance else "fixed_large"
        return Diffusion(prediction=prediction or "epsilon", sampler=Sampler(solver=solver, variance=variance))
    name = config.get("_class_name")
    if name not in CLASSES:
        raise UsageError(
            f"scheduler config: class {name!r} is not supported{nearest(str(name), CLASSES)}; "
            f"supported: {', '.join(CLASSES)} (save one of these with from_config)"
        )
    defaulted = config.get("_use_default_values", ())  # in a live scheduler's config: what its JSON did not say
    given = {key: value for key, value in config.items() if key not in defaulted and not key.startswith("_")}
    if name not in CLIPPING:
        given.pop("clip_sample", None)  # a leftover of the class that this config was made from
    if problems := _problems(given, learned_variance):
        raise UsageError(f"scheduler config: {'; '.join(problems)}")

    if prediction not in (None, given.get("prediction_type", "epsilon")):
        said = given.get("prediction_type", "epsilon")
        raise UsageError(f"prediction {prediction!r} was asked for, but the scheduler config says {said!r}")

    spacing = given.get("timestep_spacing")
    clipped = given.get("lambda_min_clipped")
    betas = given.get("trained_betas")
    order = given.get("solver_order", 2)
    solver = {"DDIMScheduler": "ddim", "DDPMScheduler": "ddpm"}.get(name, _solver_of(order))
    try:
        sampler = Sampler(
            solver=solver,
            ddpm_spacing=spacing or "leading",
            ddim_spacing=spacing or "leading",
            dpm_spacing=spacing or "linspace",
            variance=VARIANCES[given.get("variance_type") or ("learned_range" if learned_variance else "fixed_small")],
            lambda_min_clipped=None if clipped == -math.inf else clipped,
            **{key: given[key] for key in SAMPLER if key in given},
        )
        return Diffusion(
            trained_betas=tuple(betas) if isinstance(betas, list) else betas,
            sampler=sampler,
            **{ours: given[theirs] for theirs, ours in DIFFUSION.items() if theirs in given},
        )
    except UsageError as error:
        raise UsageError(f"scheduler config: {error}") from None


def _solver_of(order: int) -> str:
    return next(solver for solver, of_solver in ORDERS.items() if of_solver == order)


def _problems(given: Mapping[str, Any], learned_variance: bool) -> list[str]:
    """What we would have to ignore, a phrase for each field: its name, its value and what is supported."""
    supported: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in ONLY.items()}
    supported |= {key: CHOICES[ours] for key, ours in DIFFUSION.items() if ours in CHOICES}
    supported |= {key: CHOICES[key] for key in SAMPLER if key in CHOICES}
    supported["prediction_type"] = tuple(name for name, solvers in PREDICTIONS.items() if solvers == NOISE_SOLVERS)
    supported |= {"timestep_spacing": LIN_SPACINGS, "solver_order": tuple(ORDERS.values())}
    supported["variance_type"] = (None, *(key for key in VARIANCES if learned_variance or "learned" not in key))
    known = {*DIFFUSION, *SAMPLER, *IDLE, *SPECIAL, *supported}
    found = []
    for key, value in given.items():
        if key not in known:
            found.append(f"{key} = {value!r} is not known{nearest(key, known)}")
        elif key in supported and value not in supported[key]:
            found.append(f"{key} = {value!r} is not supported (supported: {', '.join(map(str, supported[key]))})")
    return found
