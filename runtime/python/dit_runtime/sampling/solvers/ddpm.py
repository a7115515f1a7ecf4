from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dit_runtime.errors import UsageError
from dit_runtime.sampling.denoiser import Array, Method, clip
from dit_runtime.sampling.noise import Draw
from dit_runtime.sampling.process import Sampler
from dit_runtime.sampling.schedule import Step


def ddpm(steps: Sequence[Step], x: Array, draw: Draw, sampler: Sampler, eta: float) -> Method:
    """DDPM, Ho et al. 2020 (arXiv 2006.11239), algorithm 2, between the levels of a run.

    a = α/α',  β = 1 - a²,  x' = α' β / σ² x₀ + a σ'² / σ² x + s z, with z = 0 at t = 0.
    """
    for now, after in steps:
        x0, _, variance = yield x, now
        ratio = now.alpha / after.alpha
        beta = 1 - ratio * ratio
        part = (after.sigma / now.sigma) * (after.sigma / now.sigma)
        x = after.alpha * beta / (now.sigma * now.sigma) * clip(x0, sampler) + ratio * part * x
        if now.time > 0:
            x = x + _deviation(sampler.variance, variance, beta, part) * draw(x.shape)
    return x


def lacks_variance(kind: str) -> UsageError:
    """Return the refusal of a network that does not predict the variance that the sampler takes from it."""
    return UsageError(
        f"ddpm with {kind!r} variance needs a model that predicts its variance, and this one does not; take ddim"
    )


def _deviation(kind: str, variance: Array | None, beta: float, part: float) -> float | Array:
    """Return s, Nichol & Dhariwal 2021 (arXiv 2102.09672), equations 9, 10 and 15.

    fixed_large: β;  fixed_small: β̃ = σ'² / σ² β;  learned_range: log s² = f log β + (1 - f) log β̃, f = (v + 1) / 2.
    """
    small = max(part * beta, 1e-20)
    if kind == "fixed_small":
        return math.sqrt(small)
    if kind == "fixed_large":
        return math.sqrt(beta)
    if variance is None:
        raise lacks_variance(kind)
    if kind == "learned":
        return np.sqrt(variance)
    fraction = (variance + 1) / 2
    return np.exp(0.5 * (fraction * math.log(beta) + (1 - fraction) * math.log(small)))
