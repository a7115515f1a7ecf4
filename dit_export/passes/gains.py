"""Gain folding: the 1 of `1 + scale` moves into the bias of what makes the scale.

    1 + (W c + b)[part] = (W c + b')[part],  b'[part] = b[part] + 1

Where one linear serves all blocks (adaLN-single), b is the table that a block adds to its result.

The conditioner then hands out gains and shifts, ready for LayerNormalization(x, gain, shift), and adds nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs


class Match(NamedTuple):
    add: gs.Node
    part: gs.Variable  # what the scalar is added to
    node: gs.Node  # the Gemm, or a sum of it and a table
    bias: int  # which of the node's inputs
    columns: slice  # of the bias, that make the part
    scalar: float


def fold_gains(graph: gs.Graph) -> int:
    """Folds every sum of a scalar and a part of something that has a bias; returns how many."""
    matches = [match for node in graph.nodes if node.op == "Add" and (match := _match(graph, node))]
    for add, part, node, bias, columns, scalar in matches:
        if bias == len(node.inputs):  # the exporter leaves out a bias of zeros, as adaLN-Zero starts with
            node.inputs.append(gs.Constant("", np.zeros(node.outputs[0].shape[-1], node.outputs[0].dtype)))
        values = np.array(node.inputs[bias].values)
        values[columns] += scalar
        # The exporter lets equal biases share one tensor; what is folded is this node's own.
        node.inputs[bias] = gs.Constant(f"{node.outputs[0].name}.bias", values)
        (total,) = add.outputs
        producer = part.inputs[0]
        producer.outputs[producer.outputs.index(part)] = total  # the part takes the sum's place and name
        add.outputs.clear()
    graph.cleanup()
    return len(matches)


def _match(graph: gs.Graph, add: gs.Node) -> Match | None:
    """Add(scalar, part of a sum)."""
    scalars = [tensor for tensor in add.inputs if isinstance(tensor, gs.Constant) and tensor.values.size == 1]
    parts = [tensor for tensor in add.inputs if isinstance(tensor, gs.Variable)]
    if len(scalars) != 1 or len(parts) != 1:
        return None
    found = _biased(graph, parts[0])
    return None if found is None else Match(add, parts[0], *found, float(scalars[0].values.item()))


def _biased(graph: gs.Graph, tensor: gs.Variable) -> tuple[gs.Node, int, slice] | None:
    """What adds a bias [columns] to `tensor`, and its columns: through Unsqueeze and one Split, each read once."""
    columns = slice(None)
    while len(tensor.outputs) == 1 and tensor not in graph.outputs and tensor.inputs:
        (node,) = tensor.inputs
        biases = [n for n, given in enumerate(node.inputs) if isinstance(given, gs.Constant) and given.values.ndim == 1]
        if node.op == "Gemm":
            foldable = (len(node.inputs) == 2 or 2 in biases) and node.attrs.get("beta", 1.0) == 1.0
            return (node, 2, columns) if foldable else None
        if node.op == "Add":
            return (node, biases[0], columns) if len(biases) == 1 else None
        if node.op == "Split" and columns == slice(None) and node.attrs.get("axis", 0) in (-1, len(tensor.shape) - 1):
            widths = [output.shape[-1] for output in node.outputs]
            first = sum(widths[: node.outputs.index(tensor)])
            columns = slice(first, first + tensor.shape[-1])
        elif node.op != "Unsqueeze" or tensor.shape[-1] != node.inputs[0].shape[-1]:
            return None
        tensor = node.inputs[0]
    return None
