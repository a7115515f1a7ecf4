"""Output caches: predictions of earlier steps that take the place of an evaluation of the network.

A cache holds guided predictions, so it starts anew where guidance begins, ends or changes its groups.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import UsageError, nearest
from dit_runtime.facts import FACTS
from dit_runtime.sampling.guidance import Array, Groups
from dit_runtime.sampling.process import is_integer, is_number

CACHES: dict[str, dict[str, float]] = FACTS["caches"]  # name -> its settings, fields of a request, and their defaults
SETTINGS = tuple(dict.fromkeys(key for settings in CACHES.values() for key in settings))
GREATEST_ORDER = 2


class Cache(ABC):
    """A run's cache; steps are computed before the step `before`, and from the step `after` on."""

    def __init__(self, settings: Mapping[str, Any], steps: int) -> None:
        self.settings = settings
        after = settings["disable_cache_after_step"]
        self._before, self._after = settings["disable_cache_before_step"], after if after >= 0 else steps + after
        self.clear()

    @abstractmethod
    def clear(self) -> None:
        """Forget all predictions."""

    @abstractmethod
    def guess(self, step: int, x: Array) -> NDArray[np.float32] | None:
        """Return the prediction at x; None where the network must be evaluated. Called once a step, in order."""

    @abstractmethod
    def add(self, step: int, x: Array, prediction: NDArray[Any]) -> None:
        """Take the network's prediction at x."""

    def count_rows(self, groups: Sequence[Groups | None]) -> int | None:
        """Return the rows that a run evaluates for each sample; None where that is not known beforehand."""
        return None


class TaylorSeer(Cache):
    """TaylorSeer, Liu et al. 2025 (arXiv 2503.06923), on the network's output; its steps are diffusers'.

    Σ_k D_k n^k / k! over orders up to `max_order`, n steps after the last computed one, where D_0 is its prediction
    and D_k are divided differences over the computed steps. Every `cache_interval`-th step is computed.
    """

    def clear(self) -> None:
        self._factors: list[Array] = []
        self._last = 0

    def computes(self, step: int) -> bool:
        """Return whether the schedule evaluates the network at a step."""
        regular = (step - self._before - 1) % self.settings["cache_interval"] == 0
        return bool(step < self._before or regular or step >= self._after)

    def guess(self, step: int, x: Array) -> NDArray[np.float32] | None:
        if self.computes(step) or not self._factors:
            return None
        ahead = step - self._last
        terms = [factor * (ahead**order / math.factorial(order)) for order, factor in enumerate(self._factors)]
        total: Array = sum(terms[1:], terms[0])
        return total.astype(np.float32)

    def add(self, step: int, x: Array, prediction: NDArray[Any]) -> None:
        factors: list[Array] = [np.asarray(prediction, np.float64)]
        for before in self._factors[: self.settings["max_order"]]:
            factors.append((factors[-1] - before) / (step - self._last))
        self._factors, self._last = factors, step

    def count_rows(self, groups: Sequence[Groups | None]) -> int:
        before = [None, *groups[:-1]]
        return sum(
            now.rows for step, now in enumerate(groups) if now and (self.computes(step) or now is not before[step])
        )


class EasyCache(Cache):
    """EasyCache, Zhou et al. 2025 (arXiv 2507.02860): x + (v_i - x_i) of the last computed step i, while E < τ.

    E sums k |x - x_before| / |v_i| over the steps since i, where k is |v_i - v_j| / |x_i - x_j| of the last two
    computed steps, |·| is the mean over all samples of a run, and τ is `cache_threshold`.
    """

    def clear(self) -> None:
        self._input: Array | None = None  # of the step before
        self._computed: tuple[Array, Array] | None = None  # x and v of the last computed step
        self._rate: float | None = None
        self._error = 0.0

    def guess(self, step: int, x: Array) -> NDArray[np.float32] | None:
        before, self._input = self._input, x
        if not self._before <= step < self._after or before is None or self._computed is None or self._rate is None:
            self._error = 0.0
            return None
        input_, prediction = self._computed
        self._error += self._rate * _mean(x - before) / max(_mean(prediction), TINY)
        if self._error < self.settings["cache_threshold"]:
            return (x + (prediction - input_)).astype(np.float32)
        self._error = 0.0
        return None

    def add(self, step: int, x: Array, prediction: NDArray[Any]) -> None:
        output = np.asarray(prediction, np.float64)
        if self._computed is not None:
            moved = _mean(x - self._computed[0])
            self._rate = _mean(output - self._computed[1]) / moved if moved else self._rate
        self._computed = x, output


TINY = 1e-12  # a mean below this counts as this
KINDS: dict[str, type[Cache]] = {"taylorseer": TaylorSeer, "easycache": EasyCache}


def make_cache(name: str | None, settings: Mapping[str, Any], steps: int, evaluations: int) -> Cache | None:
    """Return a run's cache, None without one; `settings` has those that are not the defaults."""
    if name is None:
        if settings:
            raise UsageError(f"got {', '.join(settings)} without a cache; known: {', '.join(CACHES)}")
        return None
    if not isinstance(name, str) or name not in CACHES:
        raise UsageError(f"cache {name!r} is not known{nearest(str(name), CACHES)}; known: {', '.join(CACHES)}")
    for key in settings:
        if key not in CACHES[name]:
            raise UsageError(f"cache {name} has no {key}; it takes {', '.join(CACHES[name])}")
    if evaluations != 1:
        raise UsageError(f"cache is {name!r} with a solver of {evaluations} evaluations a step; take one of 1")
    chosen = {**CACHES[name], **settings}
    for key, value in chosen.items():
        fits, expected = _bounds(key)
        if not (is_number(value) if key == "cache_threshold" else is_integer(value)) or not fits(value):
            raise UsageError(f"{key} is {value!r}; expected {expected}")
    return KINDS[name](chosen, steps)


def _bounds(key: str) -> tuple[Any, str]:
    return {
        "cache_interval": (lambda value: value >= 1, "an integer of 1 or more"),
        "max_order": (lambda value: 0 <= value <= GREATEST_ORDER, f"an integer from 0 to {GREATEST_ORDER}"),
        "disable_cache_before_step": (lambda value: value >= 0, "an integer of 0 or more"),
        "disable_cache_after_step": (lambda value: True, "an integer"),
        "cache_threshold": (lambda value: value >= 0, "a number of 0 or more"),
    }[key]


def _mean(values: Array) -> float:
    return float(np.abs(values).mean())
