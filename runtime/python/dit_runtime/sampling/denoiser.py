"""The adapter between networks and solvers: whatever a network predicts, solvers read x₀ and ε."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime.sampling.process import Sampler
from dit_runtime.sampling.schedule import Level

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A network's answer at x = α x₀ + σ ε."""

    x0: Array
    epsilon: Array
    variance: Array | None  # as the network gives it, where it is learned


# A solver: yields x and its level, is sent the estimate there, and returns the final x.
Method = Generator[tuple[Array, Level], Estimate, Array]


def estimate(prediction: str, x: Array, output: NDArray[Any], variance: NDArray[Any] | None, level: Level) -> Estimate:
    """Return x₀ and ε from a prediction of ε, x₀, v = α ε - σ x₀ (Salimans & Ho 2022) or a flow's ε - x₀."""
    _, alpha, sigma = level
    output = np.asarray(output, np.float64)
    learned = None if variance is None else np.asarray(variance, np.float64)
    if prediction == "epsilon":
        return Estimate((x - sigma * output) / alpha, output, learned)
    if prediction == "sample":
        return Estimate(output, (x - alpha * output) / sigma, learned)
    if prediction == "v_prediction":
        return Estimate(alpha * x - sigma * output, alpha * output + sigma * x, learned)
    return Estimate(x - sigma * output, x + alpha * output, learned)


def clip(x0: Array, sampler: Sampler) -> Array:
    return np.clip(x0, -sampler.clip_sample_range, sampler.clip_sample_range) if sampler.clip_sample else x0
