"""GroupNormalization as one scale and one shift a channel, from means over the picture:

    y = a · x + b,  a = gain / sqrt(E_group[x²] − E_group[x]² + eps),  b = bias − E_group[x] · a

Its usual forms regroup the channels first, so that a backend must leave the layout its convolutions work in, twice a
norm. Here x is only averaged, scaled and shifted, in whatever layout it has. (The difference of squares loses digits
where a group's mean is many times its deviation; the parity check of a build shows what is left.)
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.graph.onnxfile import layer


def group_norm(graph: gs.Graph) -> int:
    """Rewrites every GroupNormalization of a tensor of known rank; returns how many."""
    norms = [node for node in graph.nodes if node.op == "GroupNormalization" and _known(node)]
    for norm in norms:
        _rewrite(graph, norm)
    graph.cleanup().toposort()
    return len(norms)


def _known(norm: gs.Node) -> bool:
    return norm.inputs[0].shape is not None and all(isinstance(tensor, gs.Constant) for tensor in norm.inputs[1:])


def _rewrite(graph: gs.Graph, norm: gs.Node) -> None:
    x, gain, bias = norm.inputs
    (out,) = norm.outputs
    norm.outputs.clear()
    groups, rank = norm.attrs["num_groups"], len(x.shape)
    made = 0

    def node(op: str, *inputs: gs.Tensor | np.ndarray, **attrs: object) -> gs.Variable:
        nonlocal made
        made += 1
        return layer(graph, op, inputs, f"{out.name}.{made}", **attrs)

    def group_mean(tensor: gs.Tensor) -> gs.Variable:  # (B, C, ..., W) -> (B, groups, 1)
        # Over W alone: with channels last, ONNX Runtime adds up all of a picture in another order where B is 1.
        means = node("ReduceMean", tensor, np.array([rank - 1]), keepdims=1)
        return node("ReduceMean", node("Reshape", means, np.array([0, groups, -1])), np.array([2]), keepdims=1)

    def per_channel(tensor: gs.Tensor) -> gs.Variable:  # (B, groups, C / groups) -> (B, C, 1, ...)
        return node("Reshape", tensor, np.array([0, gain.values.size] + [1] * (rank - 2)))

    mean = group_mean(x)
    variance = node("Sub", group_mean(node("Mul", x, x)), node("Mul", mean, mean))
    deviation = node("Sqrt", node("Add", variance, np.array(norm.attrs.get("epsilon", 1e-5), np.float32)))
    scale = node("Div", gain.values.reshape(1, groups, -1), deviation)
    shift = node("Sub", bias.values.reshape(1, groups, -1), node("Mul", mean, scale))
    layer(graph, "Add", [node("Mul", x, per_channel(scale)), per_channel(shift)], out)
