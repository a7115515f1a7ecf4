from __future__ import annotations

from collections.abc import Sequence

from dit_runtime.sampling.denoiser import Array, Method
from dit_runtime.sampling.noise import Draw
from dit_runtime.sampling.process import Sampler
from dit_runtime.sampling.schedule import Step


def euler(steps: Sequence[Step], x: Array, draw: Draw, sampler: Sampler, eta: float) -> Method:
    """Euler's method on a flow's dx/dσ = ε - x₀ (Lipman et al. 2022, arXiv 2210.02747): x' = x + (σ' - σ) (ε - x₀)."""
    for now, after in steps:
        x0, epsilon, _ = yield x, now
        x = x + (after.sigma - now.sigma) * (epsilon - x0)
    return x
