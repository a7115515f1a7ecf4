from __future__ import annotations

from collections.abc import Sequence

from dit_runtime.sampling.denoiser import Array, Method
from dit_runtime.sampling.noise import Draw
from dit_runtime.sampling.process import Sampler
from dit_runtime.sampling.schedule import Step


def heun(steps: Sequence[Step], x: Array, draw: Draw, sampler: Sampler, eta: float) -> Method:
    """Heun's method on a flow, of order 2 (Karras et al. 2022, arXiv 2206.00364, algorithm 1, there for σ/α).

    v = ε - x₀ at (x, σ),  w = ε - x₀ at (x + (σ' - σ) v, σ'),  x' = x + (σ' - σ) (v + w) / 2.
    """
    for now, after in steps:
        width = after.sigma - now.sigma
        x0, epsilon, _ = yield x, now
        first = epsilon - x0
        x0, epsilon, _ = yield x + width * first, after
        x = x + width / 2 * (first + (epsilon - x0))
    return x
