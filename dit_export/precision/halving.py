"""Halving: find how many of the worst layers must stay float."""

from __future__ import annotations

from collections.abc import Callable


def fewest(most: int, holds: Callable[[int], bool]) -> int:
    """Return the least count for which `holds` is true. It is taken to be false for 0 and true for `most`."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
