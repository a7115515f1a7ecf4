"""Find how one array's values lie in another: reshapes, transpositions and slices, learned from the values."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]


class Strides(NamedTuple):
    """A view of rows: digits (size, stride) from the outermost one, an offset, and the shape of a row before and after.

    Element (i₁, i₂, …) of the digits is element offset + Σ iₖ strideₖ of the flat row.
    """

    digits: tuple[tuple[int, int], ...]
    offset: int
    source: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, rows: Tensor) -> Tensor:
        """Return (B, *shape) of (B, *source), by a view, slices of it, a permutation and a reshape."""
        if self == identity(self.source):
            return rows
        order = sorted(range(len(self.digits)), key=lambda digit: -self.digits[digit][1])
        whole, sizes, slices = math.prod(self.source), [], []
        for digit in order:
            size, stride = self.digits[digit]
            sizes.append(whole // stride)
            slices.append((self.offset % whole // stride, size))
            whole = stride
        rows = rows.reshape(-1, *sizes)
        for axis, (start, size) in enumerate(slices, 1):
            rows = rows if size == rows.shape[axis] else rows.narrow(axis, start, size)
        return rows.permute(0, *(1 + order.index(digit) for digit in range(len(order)))).reshape(-1, *self.shape)


def identity(shape: tuple[int, ...]) -> Strides:
    return Strides(((math.prod(shape), 1),), 0, shape, shape)


def find_places(target: NDArray[np.float32], source: NDArray[np.float32]) -> Indices | None:
    """Return where each element of `target` (2, N) is in `source` (2, M), by its values in both rows; or None.

    An index is refused where two elements of the source have the same values.
    """
    wanted, there = (np.ascontiguousarray(array.T, np.float32).view(np.int64).ravel() for array in (target, source))
    order = np.argsort(there, kind="stable")
    ordered = there[order]
    places = np.searchsorted(ordered, wanted).clip(max=len(ordered) - 1)
    if (ordered[places] != wanted).any():
        return None
    following = ordered[(places + 1).clip(max=len(ordered) - 1)]
    if ((following == wanted) & (places < len(ordered) - 1)).any():
        return None
    return np.asarray(order[places], np.int64)


def strides(indices: Indices, source: tuple[int, ...], shape: tuple[int, ...]) -> Strides | None:
    """Return indices into a flat row as a view of it; None where they are none."""
    digits: list[tuple[int, int]] = []
    rest = indices
    while len(rest) > 1:
        step = int(rest[1] - rest[0])
        size = _run(rest, step)
        digits.insert(0, (size, step))
        rest = rest[::size]
    view = Strides(_merge(digits), int(indices[0]), source, shape)
    return view if _is_view(view, indices) else None


def _run(values: Indices, step: int) -> int:
    """Return the longest progression that `values` begins with and whose length divides theirs."""
    breaks = np.flatnonzero(np.diff(values) != step)
    length = int(breaks[0]) + 1 if len(breaks) else len(values)
    return max(size for size in range(1, length + 1) if len(values) % size == 0)


def _merge(digits: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the digits with neighbours that count on as one."""
    merged: list[tuple[int, int]] = []
    for size, stride in digits:
        if merged and merged[-1][1] == size * stride:
            size *= merged.pop()[0]
        merged.append((size, stride))
    if all(stride != 1 for _, stride in merged):  # every so many elements, as of x[..., 0]
        merged.append((1, 1))
    return tuple(merged)


def _is_view(view: Strides, indices: Indices) -> bool:
    """Return whether the digits nest in the source, and count what the indices are."""
    counted: Any = np.full(1, view.offset)
    for size, stride in view.digits:
        counted = (counted[:, None] + stride * np.arange(size)).ravel()
    if not np.array_equal(counted, indices):
        return False
    whole = math.prod(view.source)
    for size, stride in sorted(view.digits, key=lambda digit: -digit[1]):
        if stride < 1 or whole % stride or size * stride + view.offset % whole // stride * stride > whole:
            return False
        whole = stride
    return whole == 1
