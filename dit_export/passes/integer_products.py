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
    """Rewrite every product between Q/DQ, with its bias; keep the weights as they are stored. Return how many."""
    matches = [node for node in graph.nodes if node.op == "MatMul" and _is_quantized(node)]
    grids: dict[tuple[int, float], gs.Variable] = {}  # by tensor and step: layers that share both share the u8 tensor
    for node in matches:
        quantized, stored = (tensor.inputs[0] for tensor in node.inputs)
        x, step, _ = quantized.inputs[0].inputs[0].inputs
        weight, steps, _ = stored.inputs
        (add,) = node.outputs[0].outputs
        bias = next(tensor for tensor in add.inputs if isinstance(tensor, gs.Constant))
        (total,) = add.outputs
        add.outputs.clear()
        key = id(x), float(step.values)
        if key not in grids:
            grids[key] = layer(graph, "QuantizeLinear", [x, *_grid(x, float(step.values))], f"{total.name}_u8")
            grids[key].dtype = np.dtype(np.uint8)
        _, scale, zero = grids[key].inputs[0].inputs
        symmetric = gs.Variable.empty()  # weights have no zero point
        layer(graph, "MatMulIntegerToFloat", [grids[key], weight, scale, steps, zero, symmetric, bias], total)
        graph.nodes[-1].domain = "com.microsoft"
    graph.cleanup().toposort()
    return len(matches)


def _grid(x: gs.Tensor, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the step and the zero point of a u8 grid that reaches as far as one of s8 with this step."""
    end, zero = LEVELS * step, ZERO_POINT
    if x.inputs and x.inputs[0].op == "Gelu" and end > -GELU_LEAST:
        zero = math.ceil(-GELU_LEAST * 255 / (end - GELU_LEAST))
        step = max(end / (255 - zero), -GELU_LEAST / zero)
    return np.array(step, np.float32), np.array(zero, np.uint8)


def _is_quantized(node: gs.Node) -> bool:
    if not all(tensor.inputs and tensor.inputs[0].op == "DequantizeLinear" for tensor in node.inputs):
        return False
    quantized, stored = (tensor.inputs[0].inputs[0] for tensor in node.inputs)
    reader = node.outputs[0].outputs
    has_bias = len(reader) == 1 and reader[0].op == "Add" and any(isinstance(t, gs.Constant) for t in reader[0].inputs)
    return (
        isinstance(stored, gs.Constant)
        and bool(quantized.inputs)
        and quantized.inputs[0].op == "QuantizeLinear"
        and has_bias
    )
