"""One projection for q, k and v becomes three, where a backend reads each faster from its own.

split(x W + b) = (x W_q + b_q, x W_k + b_k, x W_v + b_v);  the parts of W and b are Splits of the same constants, which
the backend folds when it compiles: the file keeps one copy of the weights.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from dit_export.graph.onnxfile import layer


def split_qkv(graph: gs.Graph) -> int:
    """Rewrite every Split of the last axis of a product with a constant and its bias; return how many."""
    matches = [match for node in graph.nodes if node.op == "Split" and (match := _match(graph, node))]
    for split, x, weight, bias in matches:
        outputs = list(split.outputs)
        split.outputs.clear()
        columns = _parts(graph, weight, outputs, "w")
        shares = _parts(graph, bias, outputs, "b")
        for column, share, output in zip(columns, shares, outputs, strict=True):
            layer(graph, "Add", [layer(graph, "MatMul", [x, column], f"{output.name}_product"), share], output)
    graph.cleanup().toposort()
    return len(matches)


def _parts(graph: gs.Graph, tensor: gs.Tensor, outputs: list[gs.Variable], name: str) -> list[gs.Variable]:
    """Split a constant, or one that is stored in 8 bits, as the outputs are split."""
    if not isinstance(tensor, gs.Constant):
        stored = tensor.inputs[0]
        columns = (_parts(graph, part, outputs, f"{name}{i}") for i, part in enumerate(stored.inputs))
        pieces = zip(outputs, *columns, strict=True)
        return [layer(graph, stored.op, piece, f"{output.name}_{name}", axis=1) for output, *piece in pieces]
    parts = [gs.Variable(f"{output.name}_{name}") for output in outputs]
    attrs = {"axis": tensor.values.ndim - 1, "num_outputs": len(parts)}
    graph.nodes.append(gs.Node("Split", parts[0].name, attrs, [tensor], parts))
    return parts


def _match(graph: gs.Graph, split: gs.Node) -> tuple[gs.Node, gs.Tensor, gs.Tensor, gs.Constant] | None:
    """Match Split(Add(MatMul(x, W), b)) into equal parts, each tensor between them read once."""
    tensor = split.inputs[0]
    if len(split.inputs) != 1 or tensor.shape is None or split.attrs.get("axis", 0) not in (-1, len(tensor.shape) - 1):
        return None
    if not tensor.inputs or tensor.inputs[0].op != "Add" or len(tensor.outputs) != 1 or tensor in graph.outputs:
        return None
    bias = [part for part in tensor.inputs[0].inputs if isinstance(part, gs.Constant)]
    products = [part for part in tensor.inputs[0].inputs if part.inputs and part.inputs[0].op == "MatMul"]
    if len(bias) != 1 or len(products) != 1 or bias[0].values.ndim != 1 or len(products[0].outputs) != 1:
        return None
    x, weight = products[0].inputs[0].inputs
    stored = weight
    if weight.inputs and weight.inputs[0].op == "DequantizeLinear" and weight.inputs[0].attrs.get("axis", 1) == 1:
        stored = weight.inputs[0].inputs[0]
    if not isinstance(stored, gs.Constant) or stored.values.ndim != 2 or stored.values.shape[1] % len(split.outputs):
        return None
    return split, x, weight, bias[0]
