from __future__ import annotations

import math
from collections.abc import Sequence

from dit_runtime.sampling.denoiser import Array, Method
from dit_runtime.sampling.noise import Draw
from dit_runtime.sampling.process import Sampler
from dit_runtime.sampling.schedule import Step


def deis(steps: Sequence[Step], x: Array, draw: Draw, sampler: Sampler, eta: float, *, order: int) -> Method:
    """DEIS multistep in log ρ, Zhang & Chen 2022 (arXiv 2204.13902), ρ = σ/α: ε is a polynomial of u = log(ρ'/ρ).

    x' = α'/α x + α' ρ (J₀ ε + J₁ E₁ + (J₂ - u₁ J₁) E₂),  J_k = ∫ uᵏ eᵘ du from 0 to -h = λ - λ' (of order 1: DDIM),
    where E₁, E₂ are the divided differences of ε over past steps and u₁ = λ - λ₁.
    """
    data: list[Array] = []  # predicted ε, newest first
    lambdas: list[float] = []
    for left, (now, after) in zip(range(len(steps) - 1, -1, -1), steps, strict=True):
        _, epsilon, _ = yield x, now
        data, lambdas = [epsilon, *data[: order - 1]], [now.log_snr, *lambdas[: order - 1]]
        current = len(data)
        if after.sigma in (0, now.sigma):
            current = 1
        elif sampler.lower_order_final:
            current = min(current, left + 1)
        h = after.log_snr - lambdas[0]
        area0 = math.expm1(-h)
        step = area0 * data[0]
        if current > 1:
            area1 = -h * math.exp(-h) - area0
            first = (data[1] - data[0]) / (lambdas[0] - lambdas[1])
            step = step + area1 * first
        if current > 2:
            area2 = h * h * math.exp(-h) - 2 * area1
            second = (data[2] - data[1]) / (lambdas[1] - lambdas[2])
            bend = (second - first) / (lambdas[0] - lambdas[2])
            step = step + (area2 - (lambdas[0] - lambdas[1]) * area1) * bend
        x = after.alpha / now.alpha * (x + now.sigma * step)
    return x
