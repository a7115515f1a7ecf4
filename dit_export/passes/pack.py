"""Packing: tensors of one stage that have the same readers and the same form travel as one.

pack = concat(tensors [rows, v, D], axis 1)  [rows, Σ v, D];   tensors = split(pack, axis 1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.passes.cut import VECTORS


class Pack(NamedTuple):
    """Name the tensors that travel together; one that is no rows × vectors × channels travels alone."""

    name: str
    tensors: tuple[str, ...]
    sizes: tuple[int, ...]  # of each along axis 1


def plan(name: str, groups: Sequence[Sequence[gs.Variable]]) -> list[Pack]:
    """Return the packs of these groups: `name`, `name`_1, …; in a group vectors come first, then the largest."""
    packs: list[Pack] = []
    for group in groups:
        forms: dict[object, list[gs.Variable]] = {}
        for tensor in group:
            packed = len(tensor.shape) == VECTORS
            forms.setdefault((tensor.shape[2], tensor.dtype) if packed else tensor.name, []).append(tensor)
        largest = sorted(forms.values(), key=lambda part: (len(part[0].shape) != VECTORS, -sum(map(_numbers, part))))
        for tensors in largest:
            sizes = tuple(int(tensor.shape[1]) if len(tensor.shape) > 1 else 1 for tensor in tensors)
            names = tuple(tensor.name for tensor in tensors)
            packs.append(Pack(f"{name}_{len(packs)}" if packs else name, names, sizes))
    return packs


def _numbers(tensor: gs.Variable) -> int:
    return math.prod(tensor.shape[1:])


def give(graph: gs.Graph, pack: Pack) -> None:
    """Make the pack an output of the graph that has its tensors as outputs."""
    parts = {tensor.name: tensor for tensor in graph.outputs if tensor.name in pack.tensors}
    graph.outputs = [tensor for tensor in graph.outputs if tensor.name not in pack.tensors]
    graph.outputs.append(_whole(pack, parts))
    if len(parts) > 1:
        ordered = [parts[name] for name in pack.tensors]
        graph.nodes.append(gs.Node("Concat", pack.name, {"axis": 1}, inputs=ordered, outputs=graph.outputs[-1:]))


def take(graph: gs.Graph, pack: Pack) -> None:
    """Make the pack an input of the graph, where its tensors are inputs."""
    parts = {tensor.name: tensor for tensor in graph.inputs if tensor.name in pack.tensors}
    if not parts:
        return
    graph.inputs = [tensor for tensor in graph.inputs if tensor.name not in pack.tensors]
    graph.inputs.append(_whole(pack, parts))
    if len(parts) > 1:
        sizes = gs.Constant(f"{pack.name}_sizes", np.array(pack.sizes, dtype=np.int64))
        ordered = [parts[name] for name in pack.tensors]
        inputs = [graph.inputs[-1], sizes]
        graph.nodes.insert(0, gs.Node("Split", pack.name, {"axis": 1}, inputs=inputs, outputs=ordered))


def _whole(pack: Pack, parts: dict[str, gs.Variable]) -> gs.Variable:
    """Return the tensor that travels; one that is alone takes the pack's name."""
    first = parts[pack.tensors[0]]
    if len(parts) > 1:
        rows, _, width = first.shape
        return gs.Variable(pack.name, dtype=first.dtype, shape=[rows, sum(pack.sizes), width])
    first.name = pack.name
    return first
