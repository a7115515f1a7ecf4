"""Weights of text encoders in 16 bits: stored so, and cast to fp32 where an fp32 graph uses them.

The casts are the first nodes: ONNX Runtime then runs each as late as it can, and has one weight in fp32 at a time.
Rows of a table are cast after they are looked up. Vectors and constants of other ops stay fp32.
fp16 ends at 65504, which no weight reaches, and has three bits more than bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.helper import tensor_dtype_to_np_dtype

from dit_export.graph.onnxfile import INLINE_BYTES, constants
from dit_export.precision.half import PRODUCTS, TYPES, Rounded

if TYPE_CHECKING:
    from torch import Tensor

SIXTEEN_BITS = {"float16": "fp16", "bfloat16": "bf16"}


def own_types(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the types of those of a checkpoint's weights that have 16 bits."""
    kinds = {name: str(weight.dtype).removeprefix("torch.") for name, weight in weights.items()}
    return {name: SIXTEEN_BITS[kind] for name, kind in kinds.items() if kind in SIXTEEN_BITS}


def store_half(graph: gs.Graph, own: Mapping[str, str], otherwise: str | None) -> int:
    """Store fp32 weights in 16 bits and return how many: those in `own` in the type there, others in `otherwise`.

    A weight whose type is None stays in fp32.
    """
    casts: list[gs.Node] = []
    count = 0
    for tensor in constants(graph):
        values, kind = tensor._values, own.get(tensor.name, otherwise)  # what is `Rounded` takes memory once it is read
        if kind is None or values.dtype != np.float32 or values.nbytes < INLINE_BYTES or len(values.shape) < 2:
            continue
        rows = [node for node in tensor.outputs if node.op == "Gather" and node.inputs[0] is tensor]
        products = [node for node in tensor.outputs if node.op in PRODUCTS and node.inputs[1] is tensor]
        if len(rows) + len(products) < len(tensor.outputs):
            continue
        narrow_type = tensor_dtype_to_np_dtype(TYPES[kind])
        for node in rows:
            (out,) = node.outputs
            node.outputs = [gs.Variable(f"{out.name}_narrow", narrow_type, out.shape)]
            cast = gs.Node("Cast", f"{out.name}_cast", {"to": onnx.TensorProto.FLOAT}, node.outputs, [out])
            graph.nodes.insert(graph.nodes.index(node) + 1, cast)
        if products:
            wide = gs.Variable(f"{tensor.name}_wide", np.float32, values.shape)
            casts.append(gs.Node("Cast", wide.name, {"to": onnx.TensorProto.FLOAT}, [tensor], [wide]))
            for node in products:
                node.inputs[1] = wide
        tensor.values = Rounded(values, narrow_type)
        count += 1
    graph.nodes = casts + list(graph.nodes)
    return count
