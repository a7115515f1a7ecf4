"""Guidance: which predictions a step takes of the network, and the policies that mix them in their own way.

A policy reads c, the prediction of a sample's own condition, u, that of its negative, and the weight w. Each sample is
mixed by itself, in float64. Linear guidance, c + (w - 1) (c - u), is the network's own and needs no policy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import UsageError, nearest
from dit_runtime.facts import FACTS
from dit_runtime.sampling.process import Process, is_number

Array = NDArray[np.float64]

POLICIES: dict[str, dict[str, float]] = FACTS["guidance_policies"]  # name -> its numbers and their defaults
CONSTANT = "constant"  # the network's own guidance
BOUNDS = {"guidance_rescale": (0.0, 1.0), "zero_init_steps": (0.0, 1e6), "norm_threshold": (0.0, math.inf)}
WHOLE = ("zero_init_steps",)
TINY = 1e-12  # a norm below this counts as this


class Groups(Enum):
    """The rows of the network that a step evaluates for each sample."""

    OWN = "own"  # its condition alone
    BOTH = "both"  # its condition and its negative, which the network mixes
    APART = "apart"  # both, as two unguided samples that a policy mixes

    @property
    def rows(self) -> int:
        """Return the rows for each sample."""
        return 1 if self is Groups.OWN else 2


class Policy(ABC):
    """A mix of two predictions on the host."""

    def __init__(self, numbers: Mapping[str, float]) -> None:
        self.numbers = numbers

    def mix(self, prediction: NDArray[Any], weights: NDArray[Any], channels: int) -> NDArray[np.float32]:
        """[2 B, C, …], own conditions before negatives -> [B, C, …], guided over the leading channels.

        A sample of weight 1 keeps its own prediction to the bit, whatever the policy.
        """
        own, away = np.split(np.asarray(prediction, np.float32), 2)
        c, u = (part[:, :channels].astype(np.float64) for part in (own, away))
        w = np.asarray(weights, np.float64).reshape(-1, *[1] * (c.ndim - 1))
        with np.errstate(over="ignore"):  # too big for float32 is inf, and refused as that
            mixed = np.where(w == 1, c, self.guide(c, u, w)).astype(np.float32)
        return np.concatenate([mixed, own[:, channels:]], axis=1)

    @abstractmethod
    def guide(self, c: Array, u: Array, w: Array) -> Array:
        """Return the guided prediction; w is (B, 1, …)."""


class Rescale(Policy):
    """Rescaled guidance, Lin et al. 2023 (arXiv 2305.08891), equations 14 to 16.

    g = c + (w - 1) (c - u),  φ std(c) / std(g) g + (1 - φ) g, with φ as `guidance_rescale`.
    """

    def guide(self, c: Array, u: Array, w: Array) -> Array:
        share = self.numbers["guidance_rescale"]
        guided = c + (w - 1) * (c - u)
        return guided * (share * _std(c) / np.maximum(_std(guided), TINY) + (1 - share))


class ZeroStar(Policy):
    """CFG-Zero*, Fan et al. 2025 (arXiv 2503.18886), algorithm 1: c + (w - 1) (c - s u),  s = <c, u> / |u|².

    The first `zero_init_steps` steps take a velocity of 0 and evaluate nothing.
    """

    def guide(self, c: Array, u: Array, w: Array) -> Array:
        scale = _sum(c * u) / (_sum(u * u) + 1e-8)
        return c + (w - 1) * (c - scale * u)


class Projected(Policy):
    """Adaptive projected guidance, Sadat et al. 2024 (arXiv 2410.02416), algorithm 1, on what the network predicts.

    d = c - u + β d_before;  d' = d min(1, r / |d|);  c + (w - 1) (d' - p + η p), where p is the part of d' along c,
    β is `momentum`, r is `norm_threshold` (0: none) and η is `eta`.
    """

    def __init__(self, numbers: Mapping[str, float]) -> None:
        super().__init__(numbers)
        self._average: Array | float = 0.0

    def guide(self, c: Array, u: Array, w: Array) -> Array:
        self._average = c - u + self.numbers["momentum"] * self._average
        difference, threshold = self._average, self.numbers["norm_threshold"]
        if threshold > 0:
            difference = difference * np.minimum(1, threshold / np.maximum(_norm(difference), TINY))
        direction = c / np.maximum(_norm(c), TINY)
        parallel = _sum(difference * direction) * direction
        return c + (w - 1) * (difference - parallel + self.numbers["eta"] * parallel)


MIXES: dict[str, type[Policy]] = {"rescale": Rescale, "zero_star": ZeroStar, "apg": Projected}


def parse_policy(words: str | None) -> tuple[str, dict[str, float]]:
    """Return the name and the numbers of "NAME KEY=VALUE …"; those that are left out have their defaults."""
    name, *pairs = str(CONSTANT if words is None else words).split() or [""]
    if name not in POLICIES:
        known = ", ".join(POLICIES)
        raise UsageError(f"guidance_policy {name!r} is not known{nearest(name, POLICIES)}; known: {known}")
    numbers = dict(POLICIES[name])
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in numbers:
            known = ", ".join(numbers) or "no numbers"
            raise UsageError(f"guidance_policy {name} has no {key!r}; it takes {known}")
        try:
            numbers[key] = float(value)
        except ValueError:
            numbers[key] = math.nan
        low, high = BOUNDS.get(key, (-math.inf, math.inf))
        what = "an integer" if key in WHOLE else "a number"
        whole = key not in WHOLE or numbers[key].is_integer()
        if not math.isfinite(numbers[key]) or not whole or not low <= numbers[key] <= high:
            raise UsageError(f"guidance_policy: {key} is {value!r}; expected {what} from {low:g} to {high:g}")
    return name, numbers


def make_policy(words: str | None) -> Policy | None:
    """Return the policy of a run; None where the network mixes its predictions itself."""
    name, numbers = parse_policy(words)
    return MIXES[name](numbers) if name in MIXES else None


def plan_guidance(
    process: Process,
    times: Sequence[float],
    evaluations: int,
    guided: bool,
    interval: Sequence[float] | None,
    words: str | None,
) -> tuple[Groups | None, ...]:
    """Return the groups of each evaluation of a run; None where the prediction is 0 and nothing is evaluated.

    A step is guided where low <= t / span <= high: of a noise process t over its training steps, of a flow σ, each as
    the network reads it.
    """
    low, high = _check_interval(interval)
    name, numbers = parse_policy(words)
    zeros = int(numbers.get("zero_init_steps", 0)) * evaluations
    if zeros and process.kind != "flow":
        if "zero_init_steps=" in (words or ""):
            raise UsageError("zero_init_steps needs a model that predicts a velocity; take 0")
        zeros = 0
    mixed = Groups.APART if name in MIXES else Groups.BOTH
    groups = [mixed if guided and low <= time / process.span <= high else Groups.OWN for time in times]
    return (*[None] * min(zeros, len(groups)), *groups[zeros:])


def _check_interval(interval: Sequence[float] | None) -> tuple[float, float]:
    if interval is None:
        return 0.0, 1.0
    bounds = list(interval) if isinstance(interval, Sequence) else [None]
    if len(bounds) != 2 or not all(map(is_number, bounds)) or not 0 <= bounds[0] <= bounds[1] <= 1:
        raise UsageError(f"guidance_interval is {interval!r}; expected two fractions of the time, low <= high")
    return bounds[0], bounds[1]


def _axes(values: Array) -> tuple[int, ...]:
    return tuple(range(1, values.ndim))


def _sum(values: Array) -> Array:
    total: Array = values.sum(axis=_axes(values), keepdims=True)
    return total


def _norm(values: Array) -> Array:
    return np.sqrt(_sum(values * values))


def _std(values: Array) -> Array:
    centred = values - values.mean(axis=_axes(values), keepdims=True)
    return _norm(centred)  # but for √N, which is the same in both
