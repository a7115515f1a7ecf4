"""Distances between sets of pictures, from the features and logits that a network gives for them; NumPy alone.

Fréchet distance: Heusel et al., arXiv 1706.08500, equation 6. Inception Score: Salimans et al., arXiv 1606.03498, in
the splits of ADM's evaluation (Dhariwal & Nichol, arXiv 2105.05233).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959964  # two-sided 95 % of a normal distribution
SPLIT = 5_000  # pictures an Inception Score is taken over; the mean of the splits is reported

Floats = NDArray[np.floating]


class Interval(NamedTuple):
    value: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


class Gaussian(NamedTuple):
    mean: Floats  # (D,)
    covariance: Floats  # (D, D)


def fit(rows: Floats) -> Gaussian:
    """Fit a Gaussian to rows (N, D), in float64."""
    rows = rows.astype(np.float64)
    return Gaussian(rows.mean(0), np.cov(rows, rowvar=False))


def gaussian_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|² + tr(A + B - 2 (A B)^½).

    The trace of (A B)^½ is the sum of the roots of the eigenvalues of A^½ B A^½, which is symmetric.
    """
    gap = a.mean - b.mean
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    return float(gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared)


def frechet_interval(features: Floats, reference: Floats, rounds: int = 100, seed: int = 0) -> Interval:
    """The distance and 1.96 bootstrap deviations to both sides.

    The deviation, not the percentiles: a resampled set has repeated rows, which lifts every resampled distance.
    """
    rng, other = np.random.default_rng(seed), fit(reference)
    value = gaussian_distance(fit(features), other)
    again = [
        gaussian_distance(fit(features[rng.integers(len(features), size=len(features))]), other) for _ in range(rounds)
    ]
    half = Z95 * float(np.std(again))
    return Interval(value, value - half, value + half)


def inception_score(logits: Floats, split: int = SPLIT) -> float:
    """exp(E_x KL(p(y | x) || p(y))), the mean over splits."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))  # (N, classes)
    scores = []
    for first in range(0, len(log_p), split):
        rows = log_p[first : first + split]
        p = np.exp(rows)
        with np.errstate(divide="ignore"):  # a class that no picture of the split is: 0 · log 0 = 0
            log_marginal = np.log(p.mean(0))
        divergence = np.where(p > 0, p * (rows - log_marginal), 0).sum(1)
        scores.append(float(np.exp(divergence.mean())))
    return float(np.mean(scores))


def wilson(hits: int, total: int) -> Interval:
    """Wilson's 95 % interval of a share; unlike the normal one it stays inside [0, 1] and is right near 1."""
    share, z2 = hits / total, Z95**2 / total
    centre = (share + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total)) / (1 + z2)
    return Interval(share, centre - half, centre + half)


def balanced_labels(count: int, classes: int) -> NDArray[np.int64]:
    """Return every class equally often, or labels spread over the classes where there are fewer pictures."""
    return np.arange(count) % classes if count >= classes else np.arange(count) * classes // count
