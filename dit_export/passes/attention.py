"""Attention in its plain form: softmax((q / √d) kᵀ + mask) v as two products and a softmax.

q is scaled before the product: in fp16 the scores would else end at 65504 before they are scaled.

In half precision the softmax reads and gives fp32. ONNX Runtime has no other on a CPU: it would write out the function,
whose ReduceSum adds in an order that depends on where a row lies in memory, and so on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.helper import np_dtype_to_tensor_dtype

from dit_export.graph.onnxfile import layer

INPUTS = (3, 4)  # q, k, v and a mask that is added; a cache would be more
DEFAULTS = {"is_causal": 0, "softcap": 0.0, "softmax_precision": None}


def plain_attention(graph: gs.Graph) -> int:
    """Rewrite every Attention without a cache over (B, heads, T, d) whose d is known; return how many.

    A mask is one of numbers that broadcasts to the scores: (B or 1, heads or 1, T or 1, L).
    """
    return _decompose_all(graph, [node for node in graph.nodes if is_plain(node)], fp32_softmax=True)


def masked_attention(graph: gs.Graph) -> int:
    """Rewrite those whose mask has one row for all queries, which ONNX Runtime's Attention refuses; return how many."""
    return _decompose_all(graph, [node for node in graph.nodes if is_plain(node) and _has_mask_of_one_row(node)])


def _decompose_all(graph: gs.Graph, attentions: Sequence[gs.Node], fp32_softmax: bool = False) -> int:
    for attention in attentions:
        decompose(graph, attention, fp32_softmax)
    graph.cleanup().toposort()
    return len(attentions)


def _has_mask_of_one_row(node: gs.Node) -> bool:
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    return mask is not None and not mask.is_empty() and mask.shape[-2] == 1 != node.inputs[0].shape[-2]


def decompose(graph: gs.Graph, attention: gs.Node, fp32_softmax: bool = False) -> None:
    q, k, v, *mask = attention.inputs
    narrow = fp32_softmax and q.dtype != np.float32
    (out,) = attention.outputs
    attention.outputs.clear()
    scale = np.array(attention.attrs.get("scale", q.shape[-1] ** -0.5), q.dtype)
    turned = layer(graph, "Transpose", [k], f"{out.name}_k", perm=[0, 1, 3, 2])
    quantized = bool(q.inputs) and q.inputs[0].op == "DequantizeLinear"  # an int8 product reads it, and makes fp32
    if not quantized:
        q = layer(graph, "Mul", [q, scale], f"{out.name}_q")
    scores = layer(graph, "MatMul", [q, turned], f"{out.name}_product" if quantized else scores_of(out))
    if quantized:
        scores = layer(graph, "Mul", [scores, scale], scores_of(out))
    if mask and not mask[0].is_empty():
        scores = layer(graph, "Add", [scores, *mask], f"{out.name}_masked")
    if narrow:
        scores = layer(graph, "Cast", [scores], f"{out.name}_scores_wide", to=onnx.TensorProto.FLOAT)
    weights = layer(graph, "Softmax", [scores], f"{out.name}_{'softmax' if narrow else 'weights'}", axis=-1)
    if narrow:
        weights = layer(graph, "Cast", [weights], f"{out.name}_weights", to=np_dtype_to_tensor_dtype(np.dtype(v.dtype)))
    layer(graph, "MatMul", [weights, v], out)


def scores_of(out: gs.Tensor) -> str:
    """Return the name of the scores that an attention's plain form stores, by the attention's output."""
    return f"{out.name}_scores"


def is_plain(node: gs.Node) -> bool:
    if node.op != "Attention":
        return False
    q, k, v, *rest = node.inputs
    mask = rest[:1] if rest and not rest[0].is_empty() else []
    whole = all(tensor.shape is not None and len(tensor.shape) == 4 for tensor in (q, k, v))
    if not whole or not isinstance(q.shape[-1], int) or not q.shape[1] == k.shape[1] == v.shape[1]:
        return False  # heads that several queries share are repeated by the op alone
    alone = len(node.inputs) in INPUTS and len(node.outputs) == 1
    added = all(tensor.dtype == q.dtype for tensor in mask)  # and not one of booleans
    return alone and added and all(node.attrs.get(name, value) == value for name, value in DEFAULTS.items())
