"""Packing: the frontier's tensors travel as one.

conditioning = concat(frontier, axis 1)  [N, K, D];   frontier = split(conditioning, axis 1)
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.fuse.hoist import VECTORS, Hoisted
from dit_runtime.errors import UsageError


def pack(hoisted: Hoisted, name: str) -> int:
    """Joins the frontier into the invariant graph's one output and the loop's one input `name`; returns K."""
    before, loop, frontier = hoisted
    counts = [_vectors(tensor, hoisted) for tensor in before.outputs]
    width = before.outputs[0].shape[-1]
    dtype, total = before.outputs[0].dtype, sum(counts)

    packed = gs.Variable(name, dtype=dtype, shape=[before.outputs[0].shape[0], total, width])
    before.nodes.append(gs.Node("Concat", name, {"axis": 1}, inputs=list(before.outputs), outputs=[packed]))
    before.outputs = [packed]

    parts = [tensor for tensor in loop.inputs if tensor.name in frontier]
    rows = parts[0].shape[0]
    given = gs.Variable(name, dtype=dtype, shape=[rows, total, width])
    sizes = gs.Constant(f"{name}_sizes", np.array(counts, dtype=np.int64))
    loop.inputs = [tensor for tensor in loop.inputs if tensor.name not in frontier] + [given]
    loop.nodes.insert(0, gs.Node("Split", name, {"axis": 1}, inputs=[given, sizes], outputs=parts))
    return total


def _vectors(tensor: gs.Variable, hoisted: Hoisted) -> int:
    first = hoisted.invariant.outputs[0]
    shape, expected = list(tensor.shape), first.shape[-1]
    if len(shape) != VECTORS or not isinstance(shape[1], int) or shape[-1] != expected or tensor.dtype != first.dtype:
        raise UsageError(
            f"{tensor.name!r} is {tensor.dtype} {shape}: cannot travel with {first.name!r}, "
            f"expected {first.dtype} [rows, vectors, {expected}]"
        )
    return shape[1]
