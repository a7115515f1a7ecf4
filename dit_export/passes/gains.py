"""Gain folding: the 1 of `1 + scale` moves into the bias of what makes the scale.

    1 + (W c + b)[part] = (W c + b')[part],  b'[part] = b[part] + 1

Where one linear serves all blocks (adaLN-single), b is the table that a block adds to its result.

The conditioner then hands out gains and shifts, ready for LayerNormalization(x, gain, shift), and adds nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.passes.dependence import Miss

SUMS = {"Add", "Sub"}


class Match(NamedTuple):
    add: gs.Node
    part: gs.Variable  # what the scalar is added to
    node: gs.Node  # the Gemm, or a sum of it and a table
    bias: int  # which of the node's inputs
    columns: slice  # of the bias, that make the part
    scalar: float


def fold_gains(graph: gs.Graph, misses: list[Miss] | None = None) -> int:
    """Fold every sum of a scalar and a part of something that has a bias; return how many."""
    candidates = [match for node in graph.nodes if node.op in SUMS and (match := _match(graph, node))]
    matches = [match for match in candidates if isinstance(match, Match)]
    if misses is not None:
        misses += [match for match in candidates if isinstance(match, Miss)]
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


def _match(graph: gs.Graph, add: gs.Node) -> Match | Miss | None:
    """Match Add(scalar, part of a sum); a difference is a near miss."""
    scalars = [tensor for tensor in add.inputs if isinstance(tensor, gs.Constant) and tensor.values.size == 1]
    parts = [tensor for tensor in add.inputs if isinstance(tensor, gs.Variable)]
    if len(scalars) != 1 or len(parts) != 1:
        return None
    biased = _biased(graph, parts[0]) if add.op == "Add" else f"{add.op} of a scalar, expected Add"
    if isinstance(biased, tuple):
        node, bias, columns = biased
        return Match(add, parts[0], node, bias, columns, float(scalars[0].values.item()))
    return Miss("fold_gains", add.outputs[0].name, biased)


def _biased(graph: gs.Graph, tensor: gs.Variable) -> tuple[gs.Node, int, slice] | str:
    """Return what adds a bias [columns] to `tensor`, and its columns: through Unsqueeze and one Split, each read once;
    otherwise why not."""
    columns = slice(None)
    while tensor.inputs:
        if len(tensor.outputs) != 1 or tensor in graph.outputs:
            return f"{tensor.name} is read {len(tensor.outputs) + (tensor in graph.outputs)} times"
        (node,) = tensor.inputs
        biases = [n for n, other in enumerate(node.inputs) if isinstance(other, gs.Constant) and other.values.ndim == 1]
        if node.op == "Gemm":
            foldable = (len(node.inputs) == 2 or 2 in biases) and node.attrs.get("beta", 1.0) == 1.0
            return (node, 2, columns) if foldable else f"{tensor.name} has a scaled bias, or one that is no vector"
        if node.op == "Add":
            return (node, biases[0], columns) if len(biases) == 1 else f"{tensor.name} is a sum without a bias"
        if node.op == "Split" and columns == slice(None) and node.attrs.get("axis", 0) in (-1, len(tensor.shape) - 1):
            widths = [output.shape[-1] for output in node.outputs]
            first = sum(widths[: node.outputs.index(tensor)])
            columns = slice(first, first + tensor.shape[-1])
        elif node.op != "Unsqueeze" or tensor.shape[-1] != node.inputs[0].shape[-1]:
            return f"{tensor.name} is made by {node.op}"
        tensor = node.inputs[0]
    return f"{tensor.name} is an input"
