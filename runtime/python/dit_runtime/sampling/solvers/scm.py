from __future__ import annotations

from collections.abc import Sequence

from dit_runtime.sampling.denoiser import Array, Method
from dit_runtime.sampling.noise import Draw
from dit_runtime.sampling.process import Sampler
from dit_runtime.sampling.schedule import Step


def scm(steps: Sequence[Step], x: Array, draw: Draw, sampler: Sampler, eta: float) -> Method:
    """Multistep consistency sampling, Song et al. 2023 (arXiv 2303.01469), algorithm 1: x' = α' x₀ + σ' z.

    A consistency network predicts the end of the path, so each step starts again with new noise; the last has none.
    """
    for now, after in steps:
        x0, _, _ = yield x, now
        x = after.alpha * x0
        if after.sigma > 0:
            x = x + after.sigma * draw(x.shape)
    return x
