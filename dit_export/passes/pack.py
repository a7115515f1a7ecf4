"""Packing: the frontier's tensors travel together, those that change with the timestep apart from those that do not.

conditioning = concat(frontier that uses the timestep, axis 1)  [N, K, D];   frontier = split(conditioning, axis 1)
context = concat(the other vectors, axis 1)  [N, M, D],   context_mask = what is no vectors  [N, L]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.passes.hoist import VECTORS, Hoisted, dependents
from dit_runtime.errors import UsageError


def group(hoisted: Hoisted, timesteps: str) -> dict[str, list[gs.Variable]]:
    """The frontier by what it depends on."""
    changing = dependents(hoisted.invariant, [timesteps])
    groups: dict[str, list[gs.Variable]] = {"conditioning": [], "context": [], "context_mask": []}
    for tensor in hoisted.invariant.outputs:
        still = "context" if len(tensor.shape) == VECTORS else "context_mask"
        groups["conditioning" if tensor.name in changing else still].append(tensor)
    return {name: tensors for name, tensors in groups.items() if tensors}


def pack(hoisted: Hoisted, name: str, tensors: Sequence[gs.Variable]) -> int:
    """Joins these tensors of the frontier into one output of the invariant graph and one input of the loop, both called
    `name`; returns how many vectors it has. A tensor that is alone takes the name."""
    before, loop, _ = hoisted
    names = [tensor.name for tensor in tensors]
    parts = {tensor.name: tensor for tensor in loop.inputs if tensor.name in names}
    before.outputs = [tensor for tensor in before.outputs if tensor.name not in names]
    loop.inputs = [tensor for tensor in loop.inputs if tensor.name not in names]
    if len(names) == 1:
        packed, given = tensors[0], parts[names[0]]
        packed.name = given.name = name
    else:
        counts = [_vectors(tensor, tensors[0]) for tensor in tensors]
        dtype, width = tensors[0].dtype, tensors[0].shape[-1]
        packed, given = (
            gs.Variable(name, dtype=dtype, shape=[rows, sum(counts), width])
            for rows in (tensors[0].shape[0], parts[names[0]].shape[0])
        )
        before.nodes.append(gs.Node("Concat", name, {"axis": 1}, inputs=list(tensors), outputs=[packed]))
        sizes = gs.Constant(f"{name}_sizes", np.array(counts, dtype=np.int64))
        split = gs.Node("Split", name, {"axis": 1}, inputs=[given, sizes], outputs=[parts[n] for n in names])
        loop.nodes.insert(0, split)
    before.outputs.append(packed)
    loop.inputs.append(given)
    return int(given.shape[1])


def _vectors(tensor: gs.Variable, first: gs.Variable) -> int:
    shape, expected = list(tensor.shape), first.shape[-1]
    if len(shape) != VECTORS or not isinstance(shape[1], int) or shape[-1] != expected or tensor.dtype != first.dtype:
        raise UsageError(
            f"{tensor.name!r} is {tensor.dtype} {shape}: cannot travel with {first.name!r}, "
            f"expected {first.dtype} [rows, vectors, {expected}]"
        )
    return shape[1]


def part(graph: gs.Graph, outputs: Sequence[str]) -> gs.Graph:
    """What the graph does for some of its outputs."""
    found = graph.copy()
    found.outputs = [tensor for tensor in found.outputs if tensor.name in outputs]
    return found.cleanup(remove_unused_graph_inputs=True).toposort()
