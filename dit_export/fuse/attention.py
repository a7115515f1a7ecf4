"""Attention in its plain form: softmax(q kᵀ / √d) v as two products and a softmax."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.graphs import layer

INPUTS = 3  # q, k, v; a mask or a cache would be more
DEFAULTS = {"is_causal": 0, "softcap": 0.0, "softmax_precision": None}


def plain_attention(graph: gs.Graph) -> int:
    """Rewrites every unmasked Attention over (B, heads, T, d) whose d is known; returns how many."""
    attentions = [node for node in graph.nodes if node.op == "Attention" and _is_plain(node)]
    for attention in attentions:
        q, k, v = attention.inputs
        (out,) = attention.outputs
        attention.outputs.clear()
        scale = np.array(attention.attrs.get("scale", q.shape[-1] ** -0.5), q.dtype)
        turned = layer(graph, "Transpose", [k], f"{out.name}_k", perm=[0, 1, 3, 2])
        scores = layer(graph, "MatMul", [q, turned], f"{out.name}_scores")
        scaled = layer(graph, "Mul", [scores, scale], f"{out.name}_scaled")
        weights = layer(graph, "Softmax", [scaled], f"{out.name}_weights", axis=-1)
        layer(graph, "MatMul", [weights, v], out)
    graph.cleanup().toposort()
    return len(attentions)


def _is_plain(node: gs.Node) -> bool:
    q = node.inputs[0]
    known = q.shape is not None and len(q.shape) == 4 and isinstance(q.shape[-1], int)
    alone = len(node.inputs) == INPUTS and len(node.outputs) == 1
    return alone and known and all(node.attrs.get(name, value) == value for name, value in DEFAULTS.items())
