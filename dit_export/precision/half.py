"""Half precision (fp16, bf16): products and attention in it, everything that sums or normalizes in fp32.

fp16 ends at 65504 and carries 11 bits. So the residual stream, LayerNorm and GroupNorm with their modulation, the gates
and the guidance stay fp32, and casts stand where a tensor crosses. Inputs and outputs stay fp32. So does every product
that touches a tensor in `overflows`, which came too near to the type's end while it was measured. Q reads its input in
the type it has; DQ gives the product its own. bf16 has fp32's range, and nothing overflows in it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.helper import tensor_dtype_to_np_dtype
from onnx_graphsurgeon.ir.tensor import LazyValues

from dit_export.graph.onnxfile import layer
from dit_export.passes.attention import scores_of

TYPES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
PRODUCTS = {"MatMul", "Gemm", "Conv", "Attention"}
ENDS = {"fp16": float(np.finfo(np.float16).max)}  # types that end before fp32 does
MARGIN = 4  # other seeds and conditions reach further than those that were measured
PEAK = "/peak"  # ends the names of the taps
FOLLOWERS = {"Reshape", "Transpose", "Split", "Gelu", "Concat", "DepthToSpace", "QuantizeLinear"}  # as their input is


class Rounded(LazyValues):
    """Values in another type, which take no memory until the graph is saved."""

    def __init__(self, values: np.ndarray, dtype: np.dtype) -> None:
        self.shape, self.dtype, self.nbytes = values.shape, dtype, values.size * dtype.itemsize
        self._values = values

    def load(self) -> np.ndarray:
        with np.errstate(over="ignore"):  # it is inf then, which the twin shows
            return self._values.astype(self.dtype)


def cast_to_half(graph: gs.Graph, precision: str, overflows: Collection[str] = ()) -> int:
    """Give the products and what hangs between them the half-precision type; return how many products are in it."""
    narrow_type, wide_type = TYPES[precision], onnx.TensorProto.FLOAT
    held: set[int] = set()  # ids of the tensors that the typed graph holds in the narrow type
    body, graph.nodes = list(graph.nodes), []
    casts: dict[tuple[int, int], gs.Tensor] = {}

    def cast(tensor: gs.Tensor, to: int) -> gs.Tensor:
        if isinstance(tensor, gs.Constant):
            return gs.Constant(f"{tensor.name}_{to}", Rounded(tensor.values, tensor_dtype_to_np_dtype(to)))
        suffix = "wide" if to == wide_type else "narrow"
        result = layer(graph, "Cast", [tensor], f"{tensor.name}_{suffix}", to=to)
        result.dtype, result.shape = tensor_dtype_to_np_dtype(to), tensor.shape
        return result

    count = 0
    for node in body:
        is_narrow = _is_narrow(node, held, overflows)
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
    for output in graph.outputs:
        if id(output) in held:  # as the pooled prompt that a projection gives
            inner = gs.Variable(f"{output.name}_inner", output.dtype, output.shape)
            for node in (*output.inputs, *output.outputs):
                for tensors in (node.inputs, node.outputs):
                    for index, tensor in enumerate(tensors):
                        if tensor is output:
                            tensors[index] = inner
            layer(graph, "Cast", [inner], output, to=wide_type)
            output.dtype = tensor_dtype_to_np_dtype(wide_type)
    graph.cleanup()
    return count


def half_tensors(graph: gs.Graph) -> list[gs.Variable]:
    """Return the tensors around products, biases and GELUs that half precision would store."""
    held: set[int] = set()
    stored: dict[str, gs.Variable] = {}
    for node in graph.nodes:
        if _is_narrow(node, held, ()):
            held |= {id(output) for output in node.outputs}
            if node.op not in FOLLOWERS or node.op == "Gelu":
                tensors = (*node.inputs, *node.outputs)
                variables = [tensor for tensor in tensors if isinstance(tensor, gs.Variable) and not tensor.is_empty()]
                stored |= {tensor.name: tensor for tensor in variables}
    return list(stored.values())


def fp32_products(graph: gs.Graph, overflows: Collection[str]) -> list[gs.Node]:
    """Return the products that stay fp32 because they touch a tensor in `overflows`."""
    return [node for node in graph.nodes if node.op in PRODUCTS and _touches(node, overflows)]


def _is_float(tensor: gs.Tensor, node: gs.Node) -> bool:
    return bool(tensor.values.dtype == np.float32) if isinstance(tensor, gs.Constant) else node.op in PRODUCTS


def _is_narrow(node: gs.Node, held: set[int], overflows: Collection[str]) -> bool:
    if _touches(node, overflows):
        return False
    if node.op == "DequantizeLinear":
        return not any(_touches(reader, overflows) for reader in node.outputs[0].outputs)
    if node.op in PRODUCTS:
        return True
    variables = [tensor for tensor in node.inputs if not isinstance(tensor, gs.Constant)]
    if not variables or not all(id(tensor) in held for tensor in variables):
        return False
    is_bias = node.op == "Add" and len(variables) == 1 and variables[0].inputs[0].op in PRODUCTS
    return node.op in FOLLOWERS or is_bias


def _touches(node: gs.Node, overflows: Collection[str]) -> bool:
    """Return whether a node reads or makes one of the tensors, quantized or not; an Attention makes scores too."""
    if not overflows:
        return False
    names = {_source(tensor).name for tensor in (*node.inputs, *node.outputs)}
    if node.op == "Attention":
        names |= {scores_of(out) for out in node.outputs}
    return not names.isdisjoint(overflows)


def find_overflows(peaks: Mapping[str, float], precision: str) -> dict[str, float]:
    """Return the tensors whose peaks are too near to the type's end, NaN among them; none for bf16."""
    limit = ENDS.get(precision, np.inf) / MARGIN
    return {name: peak for name, peak in peaks.items() if not peak <= limit}


def add_peak_taps(graph: gs.Graph, tensors: Sequence[gs.Variable]) -> None:
    """Add an output for the largest magnitude of each of the tensors."""
    for tensor in tensors:
        magnitude = layer(graph, "Abs", [tensor], f"{tensor.name}/magnitude")
        peak = layer(graph, "ReduceMax", [magnitude], tensor.name + PEAK, keepdims=0)
        peak.dtype, peak.shape = np.dtype(np.float32), []
        graph.outputs.append(peak)


def _source(tensor: gs.Tensor) -> gs.Tensor:
    while tensor.inputs and tensor.inputs[0].op in ("QuantizeLinear", "DequantizeLinear"):
        tensor = tensor.inputs[0].inputs[0]
    return tensor
