"""A typed graph: products and attention in a narrow float type, everything that sums or normalizes in fp32.

fp16 ends at 65504 and carries 11 bits, so the residual stream, LayerNorm and GroupNorm with their modulation, the gates
and the guidance stay fp32 *islands*; casts stand where a tensor crosses. Inputs and outputs stay fp32.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.helper import tensor_dtype_to_np_dtype

from dit_export.graphs import layer

TYPES = {"fp16": onnx.TensorProto.FLOAT16}
PRODUCTS = {"MatMul", "Gemm", "Conv", "Attention"}
FOLLOWERS = {"Reshape", "Transpose", "Split", "Gelu", "Concat", "DepthToSpace"}  # narrow where their input is


def narrow(graph: gs.Graph, precision: str) -> int:
    """Gives the products and what hangs between them the narrow type; returns how many products."""
    narrow_type, wide_type = TYPES[precision], onnx.TensorProto.FLOAT
    held: set[int] = set()  # ids of the tensors that the typed graph holds in the narrow type
    body, graph.nodes = list(graph.nodes), []
    casts: dict[tuple[int, int], gs.Tensor] = {}

    def cast(tensor: gs.Tensor, to: int) -> gs.Tensor:
        if isinstance(tensor, gs.Constant):
            return gs.Constant(f"{tensor.name}_{to}", tensor.values.astype(tensor_dtype_to_np_dtype(to)))
        suffix = "wide" if to == wide_type else "narrow"
        result = layer(graph, "Cast", [tensor], f"{tensor.name}_{suffix}", to=to)
        result.dtype, result.shape = tensor_dtype_to_np_dtype(to), tensor.shape
        return result

    for node in body:
        is_narrow = _is_narrow(node, held)
        for index, tensor in enumerate(node.inputs):
            if is_narrow:
                crosses = id(tensor) not in held and _is_float(tensor, node) and not tensor.is_empty()
            else:
                crosses = id(tensor) in held
            if crosses:
                key = id(tensor), narrow_type if is_narrow else wide_type
                casts[key] = casts.get(key) or cast(tensor, key[1])
                node.inputs[index] = casts[key]
        graph.nodes.append(node)
        if is_narrow:
            for output in node.outputs:
                held.add(id(output))
                output.dtype = tensor_dtype_to_np_dtype(narrow_type)
    if wrong := [output.name for output in graph.outputs if id(output) in held]:
        raise RuntimeError(f"output {wrong[0]!r} would be {precision}; expected fp32")
    graph.cleanup()
    return sum(node.op in PRODUCTS for node in graph.nodes)


def _is_float(tensor: gs.Tensor, node: gs.Node) -> bool:
    return bool(tensor.values.dtype == np.float32) if isinstance(tensor, gs.Constant) else node.op in PRODUCTS


def _is_narrow(node: gs.Node, held: set[int]) -> bool:
    if node.op in PRODUCTS:
        return True
    variables = [tensor for tensor in node.inputs if not isinstance(tensor, gs.Constant)]
    if not variables or not all(id(tensor) in held for tensor in variables):
        return False
    is_bias = node.op == "Add" and len(variables) == 1 and variables[0].inputs[0].op in PRODUCTS
    return node.op in FOLLOWERS or is_bias
