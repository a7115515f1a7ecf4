"""Find the layers that int8 covers: products of tokens and a constant, named after their weights.

A layer is x W or a 1 × 1 convolution, with a bias or without, whose input has tokens. Its name is that of its weight in
the network's state dict, without what the names of all products begin with: `transformer_blocks.3.ff.net.0.proj`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from dit_export.passes.dependence import dependents
from dit_runtime.errors import UsageError, nearest

ATTENTION = "attention"  # ends the names of attention's scores, q kᵀ
DECODER = "decoder"  # begins the names of its convolutions, which `convolutions.py` has
MOVERS = {"Reshape", "Transpose", "Identity", "Cast", "Tile"}
PRODUCTS = {"MatMul", "Gemm", "Conv"}
WEIGHT = ".weight"  # ends their names in a state dict
GROUPED = "groups"  # the first axis of what stages before the loop give the denoiser


class Scores(NamedTuple):
    """Scores of an attention whose queries and keys are what layers give, neither normalized, rotated nor joined."""

    name: str
    attention: gs.Node
    parts: tuple[tuple[str, slice], ...]  # of q and of k: the layer, and which of its output's channels


@dataclass(frozen=True)
class Layer:
    """A product of tokens and a constant weight."""

    name: str
    node: gs.Node  # MatMul(x, W) with W [K, N], or Conv(x, W) with W [N, K, 1, 1]
    scores: Scores | None = None  # that its output makes

    @property
    def x(self) -> gs.Variable:
        return self.node.inputs[0]

    @property
    def y(self) -> gs.Variable:
        """Return the output, with the bias that is added to it."""
        (product,) = self.node.outputs
        if len(product.outputs) != 1 or product.outputs[0].op != "Add":
            return product
        (add,) = product.outputs
        is_biased = any(isinstance(tensor, gs.Constant) and tensor.values.ndim == 1 for tensor in add.inputs)
        return add.outputs[0] if is_biased else product

    @property
    def is_convolution(self) -> bool:
        return self.node.op == "Conv"

    @property
    def channels(self) -> int:
        """Return the axis of the input's channels."""
        return 1 if self.is_convolution else len(self.x.shape) - 1

    @property
    def matrix(self) -> NDArray[np.float32]:
        """Return the weight as (K, N)."""
        values = np.asarray(self.node.inputs[1].values)
        return values[:, :, 0, 0].T if self.is_convolution else values

    @property
    def tokens(self) -> int:
        """Return how many tokens of a row it reads."""
        return math.prod(size for axis, size in enumerate(self.x.shape) if axis not in (0, self.channels))


def find(graph: gs.Graph) -> list[Layer]:
    """Return the layers in the loop's order, without the first product of the state and the last of the result."""
    borders = _borders(graph)
    inner = [node for node in _linears(graph) if node.outputs[0].name not in borders]
    layers = [Layer(name, node) for name, node in zip(_names(inner, _prefix(graph)), inner, strict=True)]
    scores = _scores(graph, {id(layer.y): layer.name for layer in layers})
    return [replace(layer, scores=scores.get(layer.name)) for layer in layers]


def own_weights(layers: Sequence[Layer]) -> None:
    """Give each layer a weight that no other node reads, under a name that makes the layer's."""
    for layer in layers:
        weight = layer.node.inputs[1]
        stem, others = weight.name.removesuffix(WEIGHT), [node for node in weight.outputs if node is not layer.node]
        for number, node in enumerate(others, 2):
            node.inputs[1] = gs.Constant(f"{stem}-{number}{WEIGHT}", weight.values)


def coverage(graph: gs.Graph, layers: Sequence[Layer]) -> float:
    """Return the layers' share of the weights that the loop multiplies tokens with."""
    weights = [node.inputs[1].values.size for node in _linears(graph)]
    return sum(layer.node.inputs[1].values.size for layer in layers) / max(sum(weights), 1)


def everything(layers: Sequence[Layer]) -> list[str]:
    """Return the names of all that int8 may touch: the layers, and the scores of each attention after its inputs."""
    names = []
    ends = {layer.scores.name: layer.name for layer in layers if layer.scores}
    for layer in layers:
        names.append(layer.name)
        names += [name for name, end in ends.items() if end == layer.name]
    return names


def tokens(layers: Sequence[Layer]) -> dict[str, int]:
    """Return how many tokens each of everything reads."""
    own = {layer.name: layer.tokens for layer in layers}
    return own | {layer.scores.name: layer.tokens for layer in layers if layer.scores}


def named(layers: Sequence[Layer], entries: Collection[str]) -> list[str]:
    """Return what a recipe's entries mean: a name, or parts of it that follow each other.

    "blocks.3.mlp.fc1" is a layer, "blocks.3" all of a block, "fc1" or "mlp.fc1" that of every block.
    """
    meanings = {name: _parts(name) for name in everything(layers)}
    mine = [entry for entry in entries if entry.split()[:1] != [DECODER]]
    names = list(meanings)
    examples = f'"{names[-1]}" or "{kind(names[-1])}"' if names else "none"
    return resolve(meanings, mine, "network", examples)


def resolve(meanings: Mapping[str, set[str]], entries: Collection[str], place: str, examples: str) -> list[str]:
    """Return the names that an entry means; `meanings` has by name all entries that mean it."""
    known = set().union(*meanings.values())
    if unknown := [entry for entry in entries if entry not in known]:
        raise UsageError(
            f"layer {unknown[0]!r} is not in this {place}{nearest(unknown[0], known)}; expected one such as {examples}"
        )
    return [name for name, meaning in meanings.items() if meaning & set(entries)]


def kind(name: str) -> str:
    """Return what layers of this name's kind are called in every block: the part after the block's number."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts[:-1]) if part.isdigit()), -1)
    return ".".join(parts[number + 1 :])


def unmoved(tensor: gs.Tensor, through: Collection[str] = MOVERS) -> gs.Tensor:
    """Return the tensor that the nodes of `through` moved here."""
    while tensor.inputs and tensor.inputs[0].op in through:
        tensor = tensor.inputs[0].inputs[0]
    return tensor


def _parts(name: str) -> set[str]:
    parts = name.split(".")
    runs = (parts[first:last] for last in range(len(parts) + 1) for first in range(last))
    return {".".join(run) for run in runs if not all(part.isdigit() for part in run)}


def _linears(graph: gs.Graph) -> list[gs.Node]:
    """Return the products of tokens and a constant matrix."""
    return [node for node in graph.nodes if _has_weight(node) and _is_linear(node)]


def _has_weight(node: gs.Node) -> bool:
    return node.op in PRODUCTS and isinstance(node.inputs[1], gs.Constant) and node.inputs[1].values.ndim > 1


def _is_linear(node: gs.Node) -> bool:
    rank, weight = len(node.inputs[0].shape or ()), node.inputs[1].values.shape
    if node.op == "Conv":
        pads, strides = (node.attrs.get(name, default) for name, default in (("pads", (0,)), ("strides", (1,))))
        return weight[2:] == (1, 1) and node.attrs.get("group", 1) == 1 and not any(pads) and set(strides) == {1}
    return node.op == "MatMul" and len(weight) == 2 and rank > 2


def _borders(graph: gs.Graph) -> set[str]:
    """Return the outputs of products that the state reaches, or that reach the result, through no other product."""
    products = {node.outputs[0].name for node in graph.nodes if _has_weight(node)}
    counts = {node.outputs[0].name for node in graph.nodes if node.op == "Shape"}
    state = [tensor.name for tensor in graph.inputs if tensor.shape[0] != GROUPED]
    entered = dependents(graph, state, without=products | counts)
    first = {node.outputs[0].name for node in graph.nodes if any(tensor.name in entered for tensor in node.inputs)}
    leaving = {tensor.name for tensor in graph.outputs}
    for node in reversed(graph.nodes):
        if any(tensor.name in leaving for tensor in node.outputs) and node.outputs[0].name not in products:
            leaving.update(tensor.name for tensor in node.inputs)
    return products & (first | leaving)


def _prefix(graph: gs.Graph) -> str:
    """Return what all weights' names begin with: the attribute of a module that wraps the network."""
    names = [node.inputs[1].name for node in graph.nodes if _has_weight(node)]
    paths = [name.split(".") for name in names if name.endswith(WEIGHT)]
    wrapped = len({path[0] for path in paths}) == 1 and not any(path[1].isdigit() for path in paths)
    return f"{paths[0][0]}." if wrapped and min(map(len, paths)) > 2 else ""


def _names(nodes: Sequence[gs.Node], prefix: str) -> list[str]:
    """Return a name for each node, that of its weight; from the second node that reads a weight on with a number."""
    names: list[str] = []
    for node in nodes:
        name = node.inputs[1].name.removeprefix(prefix).removesuffix(WEIGHT)
        numbers = (name if number == 1 else f"{name}-{number}" for number in count(1))
        names.append(next(free for free in numbers if free not in names))
    return names


def _scores(graph: gs.Graph, outputs: Mapping[int, str]) -> dict[str, Scores]:
    """Return by layer the scores that its output makes directly; `outputs` has layers' names by id of their outputs."""
    scores: dict[str, Scores] = {}
    for node in [node for node in graph.nodes if node.op == "Attention"]:
        parts = []
        for tensor in map(unmoved, node.inputs[:2]):
            channels = slice(None)
            if tensor.inputs and tensor.inputs[0].op == "Split":
                split = tensor.inputs[0]
                sizes = np.cumsum([0, *(part.shape[-1] for part in split.outputs)])
                place = split.outputs.index(tensor)
                if split.inputs[0].shape[-1] == sizes[-1]:
                    tensor, channels = split.inputs[0], slice(int(sizes[place]), int(sizes[place + 1]))
            if id(tensor) in outputs:
                parts.append((outputs[id(tensor)], channels))
        if len(parts) == 2:
            own = Scores(f"{parts[0][0].rpartition('.')[0]}.{ATTENTION}", node, tuple(parts))
            scores |= {name: own for name, _ in parts}
    return scores
