from __future__ import annotations

import math
from collections.abc import Sequence

from dit_runtime.sampling.denoiser import Array, Method
from dit_runtime.sampling.noise import Draw
from dit_runtime.sampling.process import Sampler
from dit_runtime.sampling.schedule import Step


def dpm(
    steps: Sequence[Step], x: Array, draw: Draw, sampler: Sampler, eta: float, *, order: int, noisy: bool = False
) -> Method:
    """DPM-Solver++ multistep, Lu et al. 2022 (arXiv 2211.01095), algorithm 2, and its third-order sibling.

    x' = σ'/σ x + α' (φ₁ D₀ + φ₂ D₁ + φ₃ D₂),  h = λ' - λ,  φ₁ = 1 - e⁻ʰ,  φ₂ = 1 - φ₁/h,  φ₃ = 1/2 - φ₂/h,
    where λ = log(α/σ), D₀ is the predicted x₀ and D₁, D₂ its scaled differences over past steps; "midpoint" has
    φ₂ = φ₁/2 in second-order steps. φ₃ is the authors' (and diffusers'), half of Taylor's: observed order 2 to 3.

    Noisy, it is the same paper's SDE-DPM-Solver++: 2h stands for h in each φ, and
    x' = σ'/σ e⁻ʰ x + α' (φ₁ D₀ + φ₂ D₁) + σ' √(1 - e⁻²ʰ) z, with no draw where that is 0.
    """
    data: list[Array] = []  # predicted x₀, newest first
    lambdas: list[float] = []
    for left, (now, after) in zip(range(len(steps) - 1, -1, -1), steps, strict=True):
        x0, _, _ = yield x, now
        data, lambdas = [x0, *data[: order - 1]], [now.log_snr, *lambdas[: order - 1]]
        current = len(data)
        if left == 0 and (sampler.lower_order_final or sampler.euler_at_final or after.sigma in (0, now.sigma)):
            current = 1
        elif left == 1 and sampler.lower_order_final:
            current = min(current, 2)
        h = after.log_snr - lambdas[0]
        width = 2 * h if noisy else h
        phi1 = -math.expm1(-width)
        step = phi1 * data[0]
        if current > 1:
            first = (data[0] - data[1]) * (h / (lambdas[0] - lambdas[1]))
            phi2 = 1 - phi1 / width
        if current == 2:
            step = step + (phi2 if sampler.solver_type == "heun" else phi1 / 2) * first
        if current == 3:
            second = (data[1] - data[2]) * (h / (lambdas[1] - lambdas[2]))
            bend = (first - second) * (h / (lambdas[0] - lambdas[2]))
            slope = first + bend * ((lambdas[0] - lambdas[1]) / h)
            step = step + phi2 * slope + (0.5 - phi2 / h) * bend
        decay = math.exp(-h) if noisy else 1.0
        x = after.sigma / now.sigma * decay * x + after.alpha * step
        deviation = after.sigma * math.sqrt(phi1) if noisy else 0.0
        if deviation > 0:
            x = x + deviation * draw(x.shape)
    return x
