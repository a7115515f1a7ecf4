"""The token GEMMs of a denoiser, found by structure: what feeds them and what reads them says which they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from dit_runtime.errors import UsageError, nearest

MOVERS = {"Reshape", "Transpose", "Identity", "Cast"}


@dataclass(frozen=True)
class Layer:
    block: int
    kind: str  # qkv, proj, fc1, fc2
    gemm: gs.Node  # MatMul(x, W) with a constant W [K, N]

    @property
    def name(self) -> str:
        return f"block {self.block} {self.kind}"

    @property
    def x(self) -> gs.Variable:
        return self.gemm.inputs[0]

    @property
    def weight(self) -> gs.Constant:
        return self.gemm.inputs[1]

    @property
    def bias(self) -> gs.Constant:
        (add,) = self.gemm.outputs[0].outputs
        return next(tensor for tensor in add.inputs if isinstance(tensor, gs.Constant))


def find(graph: gs.Graph) -> list[Layer]:
    """All of them, in the loop's order; the last linear and the patches are none (they are small, and the ends)."""
    layers, block = [], -1
    for node in graph.nodes:
        kind = _kind(node)
        if kind:
            block += kind == "qkv"
            layers.append(Layer(block, kind, node))
    return layers


def named(layers: Sequence[Layer], entries: Collection[str]) -> list[str]:
    """The layers that a recipe's entries mean: "block 3 fc1", all of "block 3", or "fc1" in every block."""
    meanings = {one.name: {one.name, f"block {one.block}", one.kind} for one in layers}
    known = set().union(*meanings.values())
    if unknown := [entry for entry in entries if entry not in known]:
        raise UsageError(
            f"layer {unknown[0]!r} is not in this network{nearest(unknown[0], known)}; "
            'expected one such as "block 0 fc2", "block 0" or "fc2"'
        )
    return [name for name, meaning in meanings.items() if meaning & set(entries)]


def _kind(node: gs.Node) -> str | None:
    if node.op != "MatMul" or not isinstance(node.inputs[1], gs.Constant) or node.inputs[1].values.ndim != 2:
        return None
    (product,) = node.outputs
    if len(product.outputs) != 1 or product.outputs[0].op != "Add":
        return None
    readers = {reader.op for reader in product.outputs[0].outputs[0].outputs}
    source = node.inputs[0]
    while source.inputs and source.inputs[0].op in MOVERS:
        source = source.inputs[0].inputs[0]
    maker = source.inputs[0].op if source.inputs else ""
    if readers == {"Split"}:
        return "qkv"
    if readers == {"Gelu"}:
        return "fc1"
    return {"Gelu": "fc2", "Attention": "proj"}.get(maker)
