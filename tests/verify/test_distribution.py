"""Scores of sets of pictures: closed forms, and the same formulae written apart, with SciPy."""

from __future__ import annotations

import numpy as np
import pytest

from dit_export.verify import distribution


def test_wilson_by_hand() -> None:
    value, low, high = distribution.wilson(10, 10)
    assert (value, high) == (1.0, pytest.approx(1.0))
    assert low == pytest.approx(10 / (10 + distribution.Z95**2))
    value, low, high = distribution.wilson(50, 100)  # the textbook's [0.404, 0.596]
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))


def gaussian(mean: list[float], cov: list[list[float]], seed: int) -> np.ndarray:
    """Rows whose mean and covariance are exactly these."""
    rows = np.random.default_rng(seed).standard_normal((50, len(mean)))
    rows -= rows.mean(0)
    rows @= np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return rows @ np.linalg.cholesky(np.array(cov)).T + mean


def test_frechet_of_gaussians_known_in_closed_form() -> None:
    a = gaussian([0, 0], [[4, 0], [0, 1]], 0)
    b = gaussian([3, -1], [[1, 0], [0, 9]], 1)
    assert distribution.frechet(a, b) == pytest.approx(10 + (2 - 1) ** 2 + (1 - 3) ** 2)
    assert distribution.frechet(a, a) == pytest.approx(0, abs=1e-9)
    # Covariances that do not commute; for 2 x 2, tr (A B)^½ = sqrt(tr A B + 2 sqrt(det A B)).
    cov_a, cov_b = np.array([[2, 1], [1, 2]]), np.array([[3, -1], [-1, 1]])
    root = np.sqrt(np.trace(cov_a @ cov_b) + 2 * np.sqrt(np.linalg.det(cov_a @ cov_b)))
    c, d = gaussian([0, 0], cov_a.tolist(), 2), gaussian([0, 0], cov_b.tolist(), 3)
    assert distribution.frechet(c, d) == pytest.approx(np.trace(cov_a + cov_b) - 2 * root)
    assert distribution.frechet(c, d) == pytest.approx(distribution.frechet(d, c))


def test_frechet_interval_covers_what_more_samples_say() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((5000, 4))
    small = distribution.frechet_interval(rng.standard_normal((500, 4)) + 0.5, reference)
    large = distribution.frechet(rng.standard_normal((50_000, 4)) + 0.5, reference)
    assert small.low < large < small.high
    assert small.high - small.low < large  # and says something
