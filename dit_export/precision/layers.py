"""Find the token GEMMs of a denoiser by structure: what feeds them and what reads them says which they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import onnx_graphsurgeon as gs

from dit_runtime.errors import UsageError, nearest

ATTENTION = "attention"  # its scores, q kᵀ
DECODER = "decoder"  # begins the names of its convolutions, which `convolutions.py` has
FIRST = {"qkv", "query", "key", "value"}  # a block begins with the first of them
MOVERS = {"Reshape", "Transpose", "Identity", "Cast", "Tile"}


@dataclass(frozen=True)
class Layer:
    """A token GEMM and its place in the network."""

    block: int
    kind: str  # qkv, or query, key and value; proj, fc1, fc2; q and cross, a cross-attention's two
    gemm: gs.Node  # MatMul(x, W) with a constant W [K, N]
    stream: int = 0  # which of its kind in the block: streams of tokens that one attention joins have their own
    attention: gs.Node | None = None  # that reads its output, or makes its input
    direct: bool = True  # the attention reads its output alone, not normalized, rotated or joined with another

    @property
    def name(self) -> str:
        return f"block {self.block} {self.kind}" + (f"-{self.stream + 1}" if self.stream else "")

    @property
    def scored(self) -> bool:
        """Return whether attention's scores are made of its output directly."""
        return self.kind in ("qkv", "query", "key") and self.direct

    @property
    def x(self) -> gs.Variable:
        return self.gemm.inputs[0]

    @property
    def y(self) -> gs.Variable:
        """Return the output, which has the bias."""
        return self.add.outputs[0]

    @property
    def weight(self) -> gs.Constant:
        return self.gemm.inputs[1]

    @property
    def add(self) -> gs.Node:
        """Return the node that adds the bias."""
        (add,) = self.gemm.outputs[0].outputs
        return add


def find(graph: gs.Graph) -> list[Layer]:
    """Return the token GEMMs in the loop's order, without the patches and the last linear, which are small."""
    layers: list[Layer] = []
    begun: set[int] = set()  # ids of the self-attentions whose blocks have begun
    for node in graph.nodes:
        if role := _role(node):
            if role.kind in FIRST:
                begun.add(id(role.attention))
            block = max(len(begun) - 1, 0)
            stream = sum((layer.block, layer.kind) == (block, role.kind) for layer in layers)
            layers.append(Layer(block, role.kind, node, stream, role.attention, role.direct))
    return layers


def coverage(graph: gs.Graph, layers: Sequence[Layer]) -> float:
    """Return the layers' share of the weights that the loop multiplies with."""
    weights = [node.inputs[1].values.size for node in graph.nodes if _is_linear(node)]
    return sum(layer.weight.values.size for layer in layers) / max(sum(weights), 1)


def everything(layers: Sequence[Layer]) -> list[str]:
    """Return the names of all that int8 may touch: the GEMMs, and the scores of each attention after its inputs."""
    names = []
    for layer in layers:
        names.append(layer.name)
        if layer.kind in ("qkv", "value") and layer.direct:
            names.append(f"block {layer.block} {ATTENTION}")
    return names


def named(layers: Sequence[Layer], entries: Collection[str]) -> list[str]:
    """Return the layers that a recipe's entries mean: "block 3 fc1", all of "block 3", or "fc1" in every block."""
    meanings = {name: {name, *name.rsplit(" ", 1)} for name in everything(layers)}
    mine = [entry for entry in entries if entry.split()[:1] != [DECODER]]
    return resolve(meanings, mine, "network", '"block 0 fc2", "block 0" or "fc2"')


def resolve(meanings: Mapping[str, set[str]], entries: Collection[str], place: str, examples: str) -> list[str]:
    """Return the names that an entry means; `meanings` has by name all entries that mean it."""
    known = set().union(*meanings.values())
    if unknown := [entry for entry in entries if entry not in known]:
        raise UsageError(
            f"layer {unknown[0]!r} is not in this {place}{nearest(unknown[0], known)}; expected one such as {examples}"
        )
    return [name for name, meaning in meanings.items() if meaning & set(entries)]


class _Role(NamedTuple):
    kind: str
    attention: gs.Node | None = None
    direct: bool = True


def _role(node: gs.Node) -> _Role | None:
    if not _is_linear(node):
        return None
    (product,) = node.outputs
    if len(product.outputs) != 1 or not _is_bias(product.outputs[0]):
        return None
    source = unmoved(node.inputs[0], {*MOVERS, "Slice"})
    maker = source.inputs[0] if source.inputs else None
    if maker is not None and maker.op == "Attention":
        return _Role("cross" if _is_crossed(maker) else "proj", maker)
    if maker is not None and maker.op == "Gelu":
        return _Role("fc2")
    result = product.outputs[0].outputs[0]
    reader, _ = _reader(result)
    if reader is None:
        return None
    if reader.op == "Split":
        readers = [_reader(part)[0] for part in reader.outputs]
        attended = readers[-1] is not None and readers[-1].op == "Attention"
        return _Role("qkv", readers[-1], all(other is readers[-1] for other in readers)) if attended else _Role("fc1")
    if reader.op == "Gelu":
        return _Role("fc1")
    reader, tensor = _reader(result, {*MOVERS, "Concat"})
    if reader is None or reader.op != "Attention":
        return None
    if _is_crossed(reader):
        return _Role("q", reader)
    direct = reader is _reader(result)[0]
    return _Role(("query", "key", "value")[reader.inputs.index(tensor)], reader, direct)


def _reader(tensor: gs.Tensor, through: Collection[str] = MOVERS) -> tuple[gs.Node | None, gs.Tensor]:
    """Return the only node that reads a tensor, and as what, after what moves it; None where several do."""
    while len(tensor.outputs) == 1 and tensor.outputs[0].op in through:
        (tensor,) = tensor.outputs[0].outputs
    return (tensor.outputs[0] if len({id(reader) for reader in tensor.outputs}) == 1 else None), tensor


def _is_crossed(attention: gs.Node) -> bool:
    """Return whether the attention's keys are made outside the loop."""
    keys = unmoved(attention.inputs[1])
    if keys.inputs and keys.inputs[0].op == "Split":
        keys = unmoved(keys.inputs[0].inputs[0])
    return not keys.inputs


def _is_linear(node: gs.Node) -> bool:
    return node.op == "MatMul" and isinstance(node.inputs[1], gs.Constant) and node.inputs[1].values.ndim == 2


def _is_bias(node: gs.Node) -> bool:
    return node.op == "Add" and any(isinstance(tensor, gs.Constant) for tensor in node.inputs)


def unmoved(tensor: gs.Tensor, through: Collection[str] = MOVERS) -> gs.Tensor:
    """Return the tensor that the nodes of `through` moved here."""
    while tensor.inputs and tensor.inputs[0].op in through:
        tensor = tensor.inputs[0].inputs[0]
    return tensor
