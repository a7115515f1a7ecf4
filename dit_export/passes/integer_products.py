"""Int8 products with the calibrated steps, for ONNX Runtime on a CPU.

DQ(Q(x)) DQ(W8) + b  →  u8 = QuantizeLinear(x, step, zero);  MatMulIntegerToFloat(u8, W8, step, steps, zero) + b

zero is 128, which makes u8 of s8; or, where a GELU makes x, where the values end that a GELU can have: its step is then
about half as wide. The products are exact, in 32 bits. The step is one number for all rows, so no row depends on the
others of its batch.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.graph.onnxfile import layer

ZERO_POINT = 128  # of u8: the middle of its range
LEVELS = 127  # of s8, on one side of 0
GELU_LEAST = -0.1701  # the least value of a GELU, by erf or by tanh


def integer_products(graph: gs.Graph) -> int:
    """Rewrite every product between Q/DQ, with its bias if it has one; keep the weights as they are stored.

    Return how many. A 1 × 1 convolution becomes a product whose channels come last.
    """
    matches = [node for node in graph.nodes if node.op in ("MatMul", "Conv") and _is_quantized(node)]
    grids: dict[tuple[int, float], gs.Variable] = {}  # by tensor and step: layers that share both share the u8 tensor
    for node in matches:
        quantized, stored = (tensor.inputs[0] for tensor in node.inputs[:2])
        x, step, _ = quantized.inputs[0].inputs[0].inputs
        weight, steps, _ = stored.inputs
        total, bias = _result(node)
        total.inputs.clear()
        key = id(x), float(step.values)
        if key not in grids:
            grids[key] = layer(graph, "QuantizeLinear", [x, *_grid(x, float(step.values))], f"{total.name}_u8")
            grids[key].dtype = np.dtype(np.uint8)
        _, scale, zero = grids[key].inputs[0].inputs
        symmetric = gs.Variable.empty()  # weights have no zero point
        tensor, product = grids[key], total
        if node.op == "Conv":
            tensor = layer(graph, "Transpose", [tensor], f"{total.name}_last", perm=[0, 2, 3, 1])
            flat = layer(graph, "Reshape", [weight, np.array(weight.values.shape[:2])], f"{total.name}_flat")
            weight = layer(graph, "Transpose", [flat], f"{total.name}_matrix", perm=[1, 0])  # folded when it is opened
            product = gs.Variable(f"{total.name}_product")
        inputs = [tensor, weight, scale, steps, zero, symmetric, *bias]
        layer(graph, "MatMulIntegerToFloat", inputs, product)
        graph.nodes[-1].domain = "com.microsoft"
        if node.op == "Conv":
            layer(graph, "Transpose", [product], total, perm=[0, 3, 1, 2])
    graph.cleanup().toposort()
    return len(matches)


def _result(node: gs.Node) -> tuple[gs.Variable, list[gs.Constant]]:
    """Return what a product gives with its bias, and the bias, if it has one."""
    (total,) = node.outputs
    if node.op == "Conv":
        return total, node.inputs[2:]
    add = total.outputs[0] if len(total.outputs) == 1 and total.outputs[0].op == "Add" else None
    bias = (
        [tensor for tensor in add.inputs if isinstance(tensor, gs.Constant) and tensor.values.ndim == 1] if add else []
    )
    return (add.outputs[0], bias) if add and bias else (total, [])


def _grid(x: gs.Tensor, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the step and the zero point of a u8 grid that reaches as far as one of s8 with this step."""
    end, zero = LEVELS * step, ZERO_POINT
    if x.inputs and x.inputs[0].op == "Gelu" and end > -GELU_LEAST:
        zero = math.ceil(-GELU_LEAST * 255 / (end - GELU_LEAST))
        step = max(end / (255 - zero), -GELU_LEAST / zero)
    return np.array(step, np.float32), np.array(zero, np.uint8)


def _is_quantized(node: gs.Node) -> bool:
    if not all(tensor.inputs and tensor.inputs[0].op == "DequantizeLinear" for tensor in node.inputs[:2]):
        return False
    quantized, stored = (tensor.inputs[0].inputs[0] for tensor in node.inputs[:2])
    return (
        isinstance(stored, gs.Constant)
        and (node.op == "MatMul" or stored.values.shape[2:] == (1, 1))
        and bool(quantized.inputs)
        and quantized.inputs[0].op == "QuantizeLinear"
        and not quantized.inputs[0].inputs[2].values.any()
    )
