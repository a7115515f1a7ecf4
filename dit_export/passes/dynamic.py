"""Int8 products whose activations are measured as they come: for ONNX Runtime on a CPU, where static ones are slow.

DQ(Q(x)) DQ(W8) + b  →  one kernel that finds x's own u8 step and zero point, and multiplies u8 by s8
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from dit_export.graph.onnxfile import layer


def dynamic(graph: gs.Graph) -> int:
    """Rewrites every product with a bias between Q/DQ, its weights stay as they are stored; returns how many."""
    matches = [node for node in graph.nodes if node.op == "MatMul" and _is_quantized(node)]
    for node in matches:
        moved, stored = (tensor.inputs[0] for tensor in node.inputs)
        whole, steps, _ = stored.inputs
        x = moved.inputs[0].inputs[0].inputs[0]
        (add,) = node.outputs[0].outputs
        bias = next(tensor for tensor in add.inputs if isinstance(tensor, gs.Constant))
        (total,) = add.outputs
        add.outputs.clear()
        zeros = gs.Variable.empty()  # given as zeros they cost 2 % of the product
        layer(graph, "DynamicQuantizeMatMul", [x, whole, steps, zeros, bias], total)
        graph.nodes[-1].domain = "com.microsoft"
    graph.cleanup().toposort()
    return len(matches)


def _is_quantized(node: gs.Node) -> bool:
    if not all(tensor.inputs and tensor.inputs[0].op == "DequantizeLinear" for tensor in node.inputs):
        return False
    moved, stored = (tensor.inputs[0].inputs[0] for tensor in node.inputs)
    reader = node.outputs[0].outputs
    has_bias = len(reader) == 1 and reader[0].op == "Add" and any(isinstance(t, gs.Constant) for t in reader[0].inputs)
    return (
        isinstance(stored, gs.Constant) and bool(moved.inputs) and moved.inputs[0].op == "QuantizeLinear" and has_bias
    )
