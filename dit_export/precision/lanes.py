"""Follow channels of a layer's input back through what only moves them: transposes, reshapes, slices, joints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Lanes(NamedTuple):
    """Channels of a layer, and where a tensor has them."""

    tensor: gs.Tensor
    axes: tuple[int, ...]  # of the tensor, those of other tokens and rows left out
    at: Ints  # coordinates along these axes, (len(axes), n)
    channels: Ints  # of the layer, (n,)


def axis_of(node: gs.Node) -> int | None:
    """Return the axis along which a node splits, slices or joins; None where it does not."""
    if node.op == "Slice":
        bounds = bounds_of(node)
        return bounds[0] if bounds else None
    rank = len(node.outputs[0].shape or ())
    return node.attrs.get("axis", 0) % rank if node.op in ("Split", "Concat") and rank else None


def bounds_of(node: gs.Node) -> tuple[int, int, int] | None:
    """Return axis, start and end of a Slice along one axis, without gaps."""
    source, *bounds = node.inputs
    if len(bounds) < 3 or any(not isinstance(t, gs.Constant) or t.values.size != 1 for t in bounds) or not source.shape:
        return None
    first, last, axis, *step = (int(tensor.values.item()) for tensor in bounds)
    size = source.shape[axis]
    if not isinstance(size, int) or step not in ([], [1]):
        return None
    first, last, _ = slice(first, last).indices(size)
    return axis % len(source.shape), first, last


def concatenated(lanes: Lanes, node: gs.Node) -> list[Lanes]:
    """Return the channels by the input of a Concat that has them."""
    row, parts, first = lanes.axes.index(axis_of(node) or 0), [], 0
    for tensor in node.inputs:
        size = tensor.shape[lanes.axes[row]]
        inside = (lanes.at[row] >= first) & (lanes.at[row] < first + size)
        at = lanes.at[:, inside].copy()
        at[row] -= first
        if inside.any():
            parts.append(Lanes(tensor, lanes.axes, at, lanes.channels[inside]))
        first += size
    return parts


def before(lanes: Lanes, node: gs.Node) -> Lanes | None:
    """Return the same channels in what a mover moves; None where they cannot be followed, or the node is no mover."""
    source, result = node.inputs[0], lanes.tensor
    if source.shape is None:
        return None
    if node.op in ("Identity", "Cast"):
        return lanes._replace(tensor=source)
    if node.op == "Transpose":
        return lanes._replace(tensor=source, axes=tuple(node.attrs["perm"][axis] for axis in lanes.axes))
    if node.op in ("Reshape", "Unsqueeze", "Squeeze"):
        return _reshaped(lanes, source)
    if node.op in ("Expand", "Tile"):
        shift = len(source.shape) - len(result.shape)
        pairs = [(axis + shift, row) for axis, row in zip(lanes.axes, lanes.at, strict=True) if axis + shift >= 0]
        if not pairs or not all(isinstance(source.shape[axis], int) for axis, _ in pairs):
            return None
        at = np.array([row % source.shape[axis] for axis, row in pairs])
        return lanes._replace(tensor=source, axes=tuple(axis for axis, _ in pairs), at=at)
    if node.op in ("Split", "Slice") and (axis := axis_of(node)) is not None:
        if axis not in lanes.axes:
            return lanes._replace(tensor=source)
        if node.op == "Slice":
            bounds = bounds_of(node)
            first = bounds[1] if bounds else 0
        else:
            first = sum(part.shape[axis] for part in node.outputs[: node.outputs.index(result)])
        at = lanes.at.copy()
        at[lanes.axes.index(axis)] += first
        return lanes._replace(tensor=source, at=at)
    return None


def _reshaped(lanes: Lanes, source: gs.Tensor) -> Lanes | None:
    """Return the channels before a Reshape, or None where it mixes axes of channels with others."""
    before, after = list(source.shape), list(lanes.tensor.shape)
    wide = [index for index, axis in enumerate(lanes.axes) if after[axis] != 1]
    axes, rows = [lanes.axes[index] for index in wide], [lanes.at[index] for index in wide]
    channel_axes: list[int] = []
    at: list[Ints] = []
    runs = _runs(before, after)
    while axes:
        old, new = next(((old, new) for old, new in runs if axes[0] in new), ([], []))
        if not new or axes[: len(new)] != new:
            return None
        flat = np.ravel_multi_index(rows[: len(new)], [after[axis] for axis in new])
        at += np.unravel_index(flat, [before[axis] for axis in old])
        channel_axes += old
        axes, rows = axes[len(new) :], rows[len(new) :]
    return lanes._replace(tensor=source, axes=tuple(channel_axes), at=np.array(at)) if channel_axes else None


def _runs(before: Sequence[int | str], after: Sequence[int | str]) -> list[tuple[list[int], list[int]]]:
    """Return which axes before and after a Reshape hold the same numbers, those of size 1 left out."""
    first = int(not isinstance(before[0], int) and not isinstance(after[0], int))  # rows
    if not all(isinstance(size, int) for size in (*before[first:], *after[first:])):
        return []
    runs, old, new, i, j = [], [], [], first, first
    left = right = 1
    while i < len(before) or j < len(after):
        if j == len(after) or (i < len(before) and left <= right):
            left, i = left * int(before[i]), i + 1
            old += [i - 1] if before[i - 1] != 1 else []
        else:
            right, j = right * int(after[j]), j + 1
            new += [j - 1] if after[j - 1] != 1 else []
        if left == right and old and new:
            runs.append((old, new))
            old, new, left, right = [], [], 1, 1
    return runs
