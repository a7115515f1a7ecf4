"""Scores of sets of pictures: closed forms, and the same formulae written apart, with SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.signal

from dit_export.verify import distribution
from dit_runtime import images


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    return distribution.gaussian_distance(distribution.fit(a), distribution.fit(b))


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
    assert frechet(a, b) == pytest.approx(10 + (2 - 1) ** 2 + (1 - 3) ** 2)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    # Covariances that do not commute; for 2 x 2, tr (A B)^½ = sqrt(tr A B + 2 sqrt(det A B)).
    cov_a, cov_b = np.array([[2, 1], [1, 2]]), np.array([[3, -1], [-1, 1]])
    root = np.sqrt(np.trace(cov_a @ cov_b) + 2 * np.sqrt(np.linalg.det(cov_a @ cov_b)))
    c, d = gaussian([0, 0], cov_a.tolist(), 2), gaussian([0, 0], cov_b.tolist(), 3)
    assert frechet(c, d) == pytest.approx(np.trace(cov_a + cov_b) - 2 * root)
    assert frechet(c, d) == pytest.approx(frechet(d, c))


def test_frechet_interval_covers_what_more_samples_say() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((5000, 4))
    small = distribution.frechet_interval(rng.standard_normal((500, 4)) + 0.5, reference)
    large = frechet(rng.standard_normal((50_000, 4)) + 0.5, reference)
    assert small.low < large < small.high
    assert small.high - small.low < large  # and says something


def features(seed: int, count: int = 400, width: int = 24) -> np.ndarray:
    """Correlated and skewed, as a network's are."""
    rng = np.random.default_rng(seed)
    return np.maximum(rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) + seed, 0)


def test_fid_as_adms_evaluator_computes_it() -> None:
    """Its formula with a general matrix root of the product, which is not symmetric, as scipy has it."""
    a, b = features(0), features(1)
    mu_a, mu_b = a.mean(axis=0), b.mean(axis=0)
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(sigma_a.dot(sigma_b))
    expected = (mu_a - mu_b).dot(mu_a - mu_b) + np.trace(sigma_a) + np.trace(sigma_b) - 2 * np.trace(root.real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet(a, features(2)) != pytest.approx(expected, rel=1e-2)


def test_fid_of_fewer_pictures_than_features() -> None:
    """Covariances without full rank: the root of the product exists still."""
    a, b = features(0, count=10), features(1, count=400)
    assert frechet(a, b) > 0
    assert frechet(a, a) == pytest.approx(0, abs=1e-5 * np.trace(np.cov(a, rowvar=False)))


def test_inception_score_as_adms_evaluator_computes_it() -> None:
    """exp(mean over a split of sum p log p − p log mean p), splits of 5000, in float64, written as its loop."""
    logits = np.random.default_rng(3).standard_normal((250, 10)) * 4
    preds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = []
    for i in range(0, len(preds), 100):
        part = preds[i : i + 100]
        kl = part * (np.log(part) - np.log(np.expand_dims(np.mean(part, 0), 0)))
        scores.append(np.exp(np.mean(np.sum(kl, 1))))
    assert distribution.inception_score(logits, split=100) == pytest.approx(np.mean(scores), rel=1e-12)
    certain = np.where(np.arange(10) == np.arange(1000)[:, None] % 10, 800.0, -800.0)  # exp of it overflows
    assert distribution.inception_score(certain) == pytest.approx(10)
    assert distribution.inception_score(np.zeros((50, 10))) == pytest.approx(1)


def test_ssim_as_it_is_published() -> None:
    """Wang et al., equation 13 with their window, by two-dimensional correlation."""
    rng = np.random.default_rng(4)
    first = rng.integers(0, 256, (40, 33, 3), np.uint8)
    second = np.clip(first + rng.normal(0, 20, first.shape), 0, 255).astype(np.uint8)
    y, x = np.mgrid[-5:6, -5:6]
    window = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2, maps = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for channel in range(3):
        a, b = first[..., channel].astype(float), second[..., channel].astype(float)

        def mean(z: np.ndarray) -> np.ndarray:
            return scipy.signal.correlate2d(z, window, mode="valid")

        mu_a, mu_b = mean(a), mean(b)
        var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
        maps.append((2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2)))
    assert images.ssim(first, second) == pytest.approx(np.mean(maps), rel=1e-9)
    assert images.ssim(first, first) == pytest.approx(1) and images.ssim(first, 255 - first) < 0
    assert images.ssim(first, second) < 0.99  # and it is not always near one
