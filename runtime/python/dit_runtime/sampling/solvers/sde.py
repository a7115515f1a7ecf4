from __future__ import annotations

import math
from collections.abc import Sequence

from dit_runtime.sampling.denoiser import Array, Method
from dit_runtime.sampling.noise import Draw
from dit_runtime.sampling.process import Sampler
from dit_runtime.sampling.schedule import Step


def sde(steps: Sequence[Step], x: Array, draw: Draw, sampler: Sampler, eta: float) -> Method:
    """Euler-Maruyama on SiT's reverse SDE, Ma et al. 2024 (arXiv 2401.08740), with their default coefficient w = σ.

    dx = (x₀ - ε + w s) dt + √(2 w) dW backwards in σ, with the score s = -ε / σ: so
    x' = x + (σ - σ') (x₀ - 2 ε) + √(2 σ (σ - σ')) z. The last step is the drift alone.
    """
    for now, after in steps:
        width = now.sigma - after.sigma
        x0, epsilon, _ = yield x, now
        x = x + width * (x0 - 2 * epsilon)
        if after.sigma > 0:
            x = x + math.sqrt(2 * now.sigma * width) * draw(x.shape)
    return x
