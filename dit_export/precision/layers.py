"""The token GEMMs of a denoiser, found by structure: what feeds them and what reads them says which they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from dit_runtime.errors import UsageError, nearest

ATTENTION = "attention"  # its scores, q kᵀ
MOVERS = {"Reshape", "Transpose", "Identity", "Cast", "Tile"}


@dataclass(frozen=True)
class Layer:
    block: int
    kind: str  # qkv, or query, key and value; proj, fc1, fc2; q and cross, a cross-attention's two
    gemm: gs.Node  # MatMul(x, W) with a constant W [K, N]

    @property
    def name(self) -> str:
        return f"block {self.block} {self.kind}"

    @property
    def scored(self) -> bool:
        """Whether attention's scores are made of its output."""
        return self.kind in ("qkv", "query", "key")

    @property
    def x(self) -> gs.Variable:
        return self.gemm.inputs[0]

    @property
    def y(self) -> gs.Variable:
        """With the bias."""
        return self.add.outputs[0]

    @property
    def weight(self) -> gs.Constant:
        return self.gemm.inputs[1]

    @property
    def add(self) -> gs.Node:
        """Of the bias."""
        (add,) = self.gemm.outputs[0].outputs
        return add


def find(graph: gs.Graph) -> list[Layer]:
    """All of them, in the loop's order; the last linear and the patches are none (they are small, and the ends)."""
    layers: list[Layer] = []
    block = -1
    for node in graph.nodes:
        kind = _kind(node)
        if kind:
            block += kind in ("qkv", "query")
            if kind == "proj" and layers and layers[-1].kind == "q":
                kind = "cross"
            layers.append(Layer(block, kind, node))
    return layers


def everything(layers: Sequence[Layer]) -> list[str]:
    """All that int8 may touch: the GEMMs, and attention's own products, which follow each qkv."""
    return [
        name
        for one in layers
        for name in (one.name, *[f"block {one.block} {ATTENTION}"] * (one.kind in ("qkv", "value")))
    ]


def named(layers: Sequence[Layer], entries: Collection[str]) -> list[str]:
    """What a recipe's entries mean: "block 3 fc1", all of "block 3", or "fc1" in every block."""
    meanings = {name: {name, *name.rsplit(" ", 1)} for name in everything(layers)}
    known = set().union(*meanings.values())
    if unknown := [entry for entry in entries if entry not in known]:
        raise UsageError(
            f"layer {unknown[0]!r} is not in this network{nearest(unknown[0], known)}; "
            'expected one such as "block 0 fc2", "block 0" or "fc2"'
        )
    return [name for name, meaning in meanings.items() if meaning & set(entries)]


def _kind(node: gs.Node) -> str | None:
    if not _is_linear(node):
        return None
    (product,) = node.outputs
    if len(product.outputs) != 1 or product.outputs[0].op != "Add":
        return None
    source = unmoved(node.inputs[0])
    made = {"Gelu": "fc2", "Attention": "proj"}.get(source.inputs[0].op if source.inputs else "")
    result = product.outputs[0].outputs[0]
    while len(result.outputs) == 1 and result.outputs[0].op in MOVERS:
        (result,) = result.outputs[0].outputs
    readers = {reader.op for reader in result.outputs}
    if made or len(readers) != 1:
        return made
    if readers == {"Attention"}:
        return _attended(result)
    return {"Split": "qkv", "Gelu": "fc1"}.get(*readers)


def _attended(tensor: gs.Tensor) -> str:
    """Return which of an attention's inputs a linear makes; a cross-attention's keys are not made in the loop."""
    (attention,) = tensor.outputs
    keys = unmoved(attention.inputs[1])
    makers = [maker for add in keys.inputs for part in add.inputs for maker in part.inputs]
    if not any(_is_linear(maker) for maker in makers):
        return "q"
    return ("query", "key", "value")[attention.inputs.index(tensor)]


def _is_linear(node: gs.Node) -> bool:
    return node.op == "MatMul" and isinstance(node.inputs[1], gs.Constant) and node.inputs[1].values.ndim == 2


def unmoved(tensor: gs.Tensor) -> gs.Tensor:
    """What it was before anything moved it."""
    while tensor.inputs and tensor.inputs[0].op in MOVERS:
        tensor = tensor.inputs[0].inputs[0]
    return tensor
