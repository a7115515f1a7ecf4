from __future__ import annotations

import math
from collections.abc import Sequence

from dit_runtime.sampling.denoiser import Array, Method, clip
from dit_runtime.sampling.noise import Draw
from dit_runtime.sampling.process import Sampler
from dit_runtime.sampling.schedule import Step


def ddim(steps: Sequence[Step], x: Array, draw: Draw, sampler: Sampler, eta: float) -> Method:
    """DDIM, Song et al. 2020 (arXiv 2010.02502), equations 12 and 16.

    s = η σ'/σ √(1 - α²/α'²),  x' = α' x₀ + √(σ'² - s²) ε + s z, with no draw where s = 0.
    """
    for now, after in steps:
        x0, epsilon, _ = yield x, now
        ratio = now.alpha / after.alpha
        deviation = eta * after.sigma / now.sigma * math.sqrt(1 - ratio * ratio)
        x = after.alpha * clip(x0, sampler) + math.sqrt(after.sigma * after.sigma - deviation * deviation) * epsilon
        if deviation > 0:
            x = x + deviation * draw(x.shape)
    return x
