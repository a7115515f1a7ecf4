"""A typed graph: products and attention in a narrow float type, everything that sums or normalizes in fp32.

fp16 ends at 65504 and carries 11 bits, so the residual stream, LayerNorm and GroupNorm with their modulation, the gates
and the guidance stay fp32 *islands*; casts stand where a tensor crosses. Inputs and outputs stay fp32. So does every
product that touches a tensor in `wide`: what calibration saw too near to the type's end. Q reads what there is, in its
type; DQ gives the product its own.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.helper import tensor_dtype_to_np_dtype

from dit_export.graph.onnxfile import layer

TYPES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
PRODUCTS = {"MatMul", "Gemm", "Conv", "Attention"}
FOLLOWERS = {"Reshape", "Transpose", "Split", "Gelu", "Concat", "DepthToSpace", "QuantizeLinear"}  # as their input is


def narrow(graph: gs.Graph, precision: str, wide: Collection[str] = ()) -> int:
    """Gives the products and what hangs between them the narrow type; returns how many products are now in it."""
    narrow_type, wide_type = TYPES[precision], onnx.TensorProto.FLOAT
    held: set[int] = set()  # ids of the tensors that the typed graph holds in the narrow type
    body, graph.nodes = list(graph.nodes), []
    casts: dict[tuple[int, int], gs.Tensor] = {}

    def cast(tensor: gs.Tensor, to: int) -> gs.Tensor:
        if isinstance(tensor, gs.Constant):
            with np.errstate(over="ignore"):  # it is inf then, which the twin shows
                return gs.Constant(f"{tensor.name}_{to}", tensor.values.astype(tensor_dtype_to_np_dtype(to)))
        suffix = "wide" if to == wide_type else "narrow"
        result = layer(graph, "Cast", [tensor], f"{tensor.name}_{suffix}", to=to)
        result.dtype, result.shape = tensor_dtype_to_np_dtype(to), tensor.shape
        return result

    count = 0
    for node in body:
        is_narrow = _is_narrow(node, held, wide)
        count += is_narrow and node.op in PRODUCTS
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
        if is_narrow and node.op != "QuantizeLinear":  # which makes integers
            for output in node.outputs:
                held.add(id(output))
                output.dtype = tensor_dtype_to_np_dtype(narrow_type)
    if wrong := [output.name for output in graph.outputs if id(output) in held]:
        raise RuntimeError(f"output {wrong[0]!r} would be {precision}; expected fp32")
    graph.cleanup()
    return count


def watched(graph: gs.Graph) -> list[gs.Variable]:
    """What a typed graph would hold in the narrow type, and calibration must see: around products, biases and GELUs."""
    held: set[int] = set()
    found: dict[str, gs.Variable] = {}
    for node in graph.nodes:
        if _is_narrow(node, held, ()):
            held |= {id(output) for output in node.outputs}
            if node.op not in FOLLOWERS or node.op == "Gelu":
                tensors = (*node.inputs, *node.outputs)
                found |= {one.name: one for one in tensors if isinstance(one, gs.Variable) and not one.is_empty()}
    return list(found.values())


def islands(graph: gs.Graph, wide: Collection[str]) -> list[gs.Node]:
    """The products that `wide` keeps in fp32."""
    return [node for node in graph.nodes if node.op in PRODUCTS and _touches(node, wide)]


def _is_float(tensor: gs.Tensor, node: gs.Node) -> bool:
    return bool(tensor.values.dtype == np.float32) if isinstance(tensor, gs.Constant) else node.op in PRODUCTS


def _is_narrow(node: gs.Node, held: set[int], wide: Collection[str]) -> bool:
    if _touches(node, wide):
        return False
    if node.op == "DequantizeLinear":
        return not any(_touches(reader, wide) for reader in node.outputs[0].outputs)
    if node.op in PRODUCTS:
        return True
    variables = [tensor for tensor in node.inputs if not isinstance(tensor, gs.Constant)]
    if not variables or not all(id(tensor) in held for tensor in variables):
        return False
    is_bias = node.op == "Add" and len(variables) == 1 and variables[0].inputs[0].op in PRODUCTS
    return node.op in FOLLOWERS or is_bias


def _touches(node: gs.Node, wide: Collection[str]) -> bool:
    """Whether a node reads or makes a wide tensor, also through Q and DQ."""
    return bool(wide) and any(_source(tensor).name in wide for tensor in (*node.inputs, *node.outputs))


def _source(tensor: gs.Tensor) -> gs.Tensor:
    while tensor.inputs and tensor.inputs[0].op in ("QuantizeLinear", "DequantizeLinear"):
        tensor = tensor.inputs[0].inputs[0]
    return tensor
