"""Curves of σ between two ends: what spreads the steps of a run other than evenly."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dit_runtime.sampling.process import Process

RHO = 7.0  # Karras et al.'s
BETA = 0.6  # Lee et al.'s, for both parameters
NEWTON, TERMS = 6, 60  # enough for float64: a term is half of the last at most, and the start is off by 10 %


def curve(name: str, first: float, last: float, steps: int) -> NDArray[np.float64]:
    """Return σ from `first` down to `last`; (N,).

    "karras": σ^(1/7) is even (Karras et al. 2022, arXiv 2206.00364, equation 5). "exponential": log σ is even.
    "beta": σ is a quantile of Beta(0.6, 0.6) at even probabilities (Lee et al. 2024, arXiv 2407.12173).
    """
    even = np.linspace(0, 1, steps)
    if name == "karras":
        high, low = first ** (1 / RHO), last ** (1 / RHO)
        karras: NDArray[np.float64] = (high + even * (low - high)) ** RHO
        return karras
    if name == "exponential":
        return np.exp(np.linspace(math.log(first), math.log(last), steps))
    return last + beta_quantile(1 - even) * (first - last)


def training_ratios(process: Process) -> NDArray[np.float64]:
    """Return σ/α of each training step."""
    levels = process.alpha_bar
    return np.sqrt((1 - levels) / levels)


def curve_ratios(process: Process, name: str, steps: int) -> NDArray[np.float64]:
    """Return σ/α along a curve between the ends of the training steps; (N,)."""
    ratios = training_ratios(process)
    return curve(name, float(ratios[-1]), float(ratios[0]), steps)


def beta_quantile(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x with I_x(a, a) = p for a = BETA, by Newton's method up to 1/2, and mirrored above it.

    ∫₀ˣ (t (1 - t))ᵃ⁻¹ dt = xᵃ Σ c_n xⁿ / (a + n),  c_n = c_{n-1} (n - a) / n.  The start, x with (2 x)ᵃ = 2 p, lies
    below the root, and the integral is concave: so every iterate does.
    """
    low = np.minimum(probabilities, 1 - probabilities)
    target = low * (math.gamma(BETA) ** 2 / math.gamma(2 * BETA))
    x = 0.5 * (2 * low) ** (1 / BETA)
    for _ in range(NEWTON):
        total, term = np.full_like(x, 1 / BETA), np.ones_like(x)
        for n in range(1, TERMS):
            term = term * ((n - BETA) / n) * x
            total = total + term / (BETA + n)
        x = x - (x * total - target * x ** (1 - BETA)) * (1 - x) ** (1 - BETA)
    return np.where(probabilities > 0.5, 1 - x, x)
