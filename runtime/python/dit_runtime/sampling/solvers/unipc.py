from __future__ import annotations

import math
from collections.abc import Sequence

from dit_runtime.sampling.denoiser import Array, Method
from dit_runtime.sampling.noise import Draw
from dit_runtime.sampling.process import Sampler
from dit_runtime.sampling.schedule import Level, Step

Node = tuple[float, Array]  # λ, and the x₀ that was predicted there


def unipc(steps: Sequence[Step], x: Array, draw: Draw, sampler: Sampler, eta: float, *, order: int) -> Method:
    """UniPC, Zhao et al. 2023 (arXiv 2302.04867): UniP and UniC of order p, multistep, in predicted x₀.

    UniP takes a step with the last p predictions. Once the network has predicted at its end too, UniC takes the same
    step again with p + 1, and the next step starts from there.
    """
    nodes: list[Node] = []  # newest first
    start, before, current = x, steps[0].now, 0  # of the last step
    for left, (now, after) in zip(range(len(steps) - 1, -1, -1), steps, strict=True):
        x0, _, _ = yield x, now
        if nodes:
            x = _advance(start, before, now, [*nodes[:current], (now.log_snr, x0)], sampler)
        nodes = [(now.log_snr, x0), *nodes[: order - 1]]
        start, before, current = x, now, len(nodes)
        if after.sigma in (0, now.sigma):
            current = 1
        elif sampler.lower_order_final:
            current = min(current, left + 1)
        x = _advance(start, now, after, nodes[:current], sampler)
    return x


def _advance(x: Array, now: Level, after: Level, nodes: Sequence[Node], sampler: Sampler) -> Array:
    """Return x' = σ'/σ x + α' (φ₁ D₀ + Σ w_k (D_k - D₀) / r_k),  h = λ' - λ,  r_k = (λ_k - λ) / h.

    φ₁ = 1 - e⁻ʰ, φ_{i+1} = 1/i! - φ_i/h, and the weights solve Σ w_k r_kⁱ⁻¹ = i! φ_{i+1} for i = 1 … n. But a single
    weight is B/2, where B is h (bh1) or φ₁ (bh2); of several, the paper's B(h) cancels.
    """
    (start, data), *others = nodes
    h = after.log_snr - start
    phi = phi1 = -math.expm1(-h)
    moments = []
    for index in range(1, len(others) + 1):
        phi = 1 / math.factorial(index) - phi / h
        moments.append(math.factorial(index) * phi)
    if len(others) == 1:
        moments = [(h if sampler.solver_type == "bh1" else phi1) / 2]
    rates = [(place - start) / h for place, _ in others]
    step = phi1 * data
    for weight, rate, (_, other) in zip(_weights(rates, moments), rates, others, strict=True):
        step = step + weight / rate * (other - data)
    return after.sigma / now.sigma * x + after.alpha * step


def _weights(rates: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Solve Σ w_k r_kⁱ = m_i, i from 0, by Björck & Pereyra 1970."""
    weights, count = list(moments), len(rates)
    for column in range(count - 1):
        for row in range(count - 1, column, -1):
            weights[row] -= rates[column] * weights[row - 1]
    for column in range(count - 2, -1, -1):
        for row in range(column + 1, count):
            weights[row] /= rates[row] - rates[row - column - 1]
        for row in range(column, count - 1):
            weights[row] -= weights[row + 1]
    return weights
