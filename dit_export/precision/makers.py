"""Find what makes the channels that a layer reads, so that they can be divided there, without an op more in the loop.

MAKERS has a rule for each op that a division can be passed on through: it goes to all terms of a sum, to one factor of
a product, to the values of an attention. It ends in parameters (a norm's gain; columns of a weight, and its bias) or in
what stages before the loop give (adaLN's gains and shifts; the values of a cross-attention). On the way each tensor
must have one reader. Where several blocks are modulated by one vector, all their layers share divisors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.precision.lanes import Ints, Lanes, axis_of, before, bounds_of, concatenated
from dit_export.precision.layers import GROUPED, Layer, unmoved

TOKENS = 1  # the axis along which stages pack vectors and tokens


class Place(NamedTuple):
    """A node's input, a parameter or a tensor made before the loop, that can be divided in place of a layer's input."""

    node: gs.Node
    input: int  # which of the node's
    axis: int  # of the input's channels
    at: Ints  # the input's channels, (n,)
    channels: Ints  # of the layer, which they make, (n,)


class Group(NamedTuple):
    """Layers that share divisors: they read one tensor, parts of its tokens, or what one vector modulates."""

    layers: list[Layer]
    places: list[Place]  # to be divided, all of them

    @property
    def channels(self) -> Ints:
        """Return the layers' channels that can be divided."""
        return np.unique(np.concatenate([place.channels for place in self.places] or [np.empty(0, np.int64)]))

    @property
    def vectors(self) -> set[int]:
        """Return the ids of the tensors from before the loop that are divided."""
        tensors = [place.node.inputs[place.input] for place in self.places]
        return {id(tensor) for tensor in tensors if not isinstance(tensor, gs.Constant)}

    @property
    def inputs(self) -> list[list[Layer]]:
        """Return the layers by what they read."""
        by_tensor: dict[int, list[Layer]] = {}
        for layer in self.layers:
            by_tensor.setdefault(id(layer.x), []).append(layer)
        return list(by_tensor.values())


def grouped(layers: Sequence[Layer]) -> list[Group]:
    """Return the layers that share divisors, and the places where the divisors go."""
    roots: dict[tuple[int, tuple[int, ...], bytes], tuple[Lanes, list[Layer], list[gs.Node]]] = {}
    for layer in layers:
        channels = np.arange(len(layer.matrix))
        lanes, passed = _root(Lanes(layer.x, (layer.channels,), channels[None], channels))
        key = id(lanes.tensor), lanes.axes, lanes.at.tobytes()
        _, members, readers = roots.setdefault(key, (lanes, [], []))
        members.append(layer)
        readers += [layer.node, *passed]
    return _joined([Group(members, _shared(lanes, members, readers)) for lanes, members, readers in roots.values()])


def _shared(lanes: Lanes, layers: Sequence[Layer], readers: Sequence[gs.Node]) -> list[Place]:
    """Return the places to divide; none where another node reads what is moved from there to the layers."""
    known, ends = {id(node) for node in readers}, {id(layer.node) for layer in layers}
    moved = [tensor for node in readers if id(node) not in ends for tensor in node.outputs]
    alone = known.issuperset(id(user) for tensor in moved for user in tensor.outputs)
    return _by_parts(lanes, known) if alone else []


def _joined(groups: Sequence[Group]) -> list[Group]:
    """Join the groups that divide one vector; what others read, too, is not divided."""
    clusters: list[list[Group]] = []
    for group in groups:
        same = [cluster for cluster in clusters if any(group.vectors & other.vectors for other in cluster)]
        clusters = [cluster for cluster in clusters if not any(cluster is other for other in same)]
        clusters.append([*chain(*same), group])
    joined = []
    for cluster in clusters:
        layers, places = (list(chain(*parts)) for parts in zip(*cluster, strict=True))
        whole = Group(layers, places)
        joined += [whole] if _has_all_readers(whole) else [Group(group.layers, []) for group in cluster]
    return joined


def _has_all_readers(group: Group) -> bool:
    """Return whether nothing else reads the group's vectors, which are its layers' inputs channel by channel."""
    readers = {id(place.node) for place in group.places} | {id(layer.node) for layer in group.layers}
    for place in group.places:
        tensor = place.node.inputs[place.input]
        if id(tensor) in group.vectors and len(tensor.outputs) > 1:
            same = np.array_equal(place.at, place.channels) and len({len(layer.matrix) for layer in group.layers}) == 1
            if not same or not readers.issuperset(map(id, tensor.outputs)):
                return False
    return True


def _root(lanes: Lanes) -> tuple[Lanes, list[gs.Node]]:
    """Return the same channels in the tensor that is moved to a layer, or part of whose tokens is; and the movers."""
    passed: list[gs.Node] = []
    while (node := _maker(lanes.tensor)) and axis_of(node) not in lanes.axes and (source := before(lanes, node)):
        passed.append(node)
        lanes = source
    return lanes, passed


def _by_parts(lanes: Lanes, readers: Collection[int]) -> list[Place]:
    """Return the places to divide; of channels that several tensors make, those that can be divided."""
    node = _maker(lanes.tensor)
    if node and node.op == "Concat" and axis_of(node) in lanes.axes and _has_readers(lanes, readers):
        if _repeats(node):
            return []
        parts = [_places(part, {id(node)}) for part in concatenated(lanes, node)]
        return [place for part in parts if part for place in part]
    return _places(lanes, readers) or []


def _places(lanes: Lanes, readers: Collection[int]) -> list[Place] | None:
    """Return what can be divided in the place of these channels; None where nothing can."""
    node = _maker(lanes.tensor)
    if node is None:
        return None
    if node.op == "Split" and axis_of(node) == TOKENS and _is_given(node.inputs[0]):
        if lanes.axes != (len(lanes.tensor.shape) - 1,):
            return None
        reader = next(reader for reader in lanes.tensor.outputs if id(reader) in readers)
        return [Place(reader, reader.inputs.index(lanes.tensor), lanes.axes[0], lanes.at[0], lanes.channels)]
    if not _has_readers(lanes, readers):
        return None
    if node.op in MAKERS:
        return MAKERS[node.op](lanes, node)
    if node.op in ("Split", "Slice") and axis_of(node) not in lanes.axes:
        return None  # the other tokens are not to be divided
    source = before(lanes, node)
    return _places(source, {id(node)}) if source else None


def _maker(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs and tensor.shape is not None else None


def _is_given(tensor: gs.Tensor) -> bool:
    source = unmoved(tensor)
    return not source.inputs and bool(source.shape) and source.shape[0] == GROUPED


def _has_readers(lanes: Lanes, readers: Collection[int]) -> bool:
    """Return whether only `readers` read these channels."""
    return all(id(node) in readers or _spares(node, lanes) for node in lanes.tensor.outputs)


def _spares(node: gs.Node, lanes: Lanes) -> bool:
    """Return whether a node takes other channels of the tensor."""
    if node.op != "Slice" or (bounds := bounds_of(node)) is None or bounds[0] not in lanes.axes:
        return False
    axis, first, last = bounds
    at = lanes.at[lanes.axes.index(axis)]
    return not ((at >= first) & (at < last)).any()


# The rules: what a node's output is divided by, its inputs are.


def _operand(lanes: Lanes, node: gs.Node, index: int) -> list[Place] | None:
    """Return the places of an input that is as wide as the output, or of a vector that is added or multiplied."""
    tensor = node.inputs[index]
    if tensor.shape is None:
        return None
    shift = len(tensor.shape) - len(lanes.tensor.shape)
    axes = tuple(axis + shift for axis in lanes.axes)
    if min(axes) < 0 or any(tensor.shape[axis] != lanes.tensor.shape[axis - shift] for axis in axes):
        return None
    if isinstance(tensor, gs.Constant):
        return [Place(node, index, axes[0], lanes.at[0], lanes.channels)] if len(axes) == 1 else None
    return _places(lanes._replace(tensor=tensor, axes=axes), {id(node)})


def _all(parts: Sequence[list[Place] | None]) -> list[Place] | None:
    places = [place for part in parts if part is not None for place in part]
    return places if None not in parts else None


def _repeats(node: gs.Node) -> bool:
    """Return whether a node reads one tensor twice, which would be divided twice."""
    return len({id(tensor) for tensor in node.inputs}) < len(node.inputs)


def _sum(lanes: Lanes, node: gs.Node) -> list[Place] | None:
    if _repeats(node):
        return None
    return _all([_operand(lanes, node, index) for index in range(len(node.inputs))])


def _product(lanes: Lanes, node: gs.Node) -> list[Place] | None:
    """Divide a factor, the smaller one first: a vector, or the linear half of a gated unit."""
    if _repeats(node):
        return None
    sizes = [np.prod([size for size in tensor.shape or () if isinstance(size, int)]) for tensor in node.inputs]
    operands = (_operand(lanes, node, index) for index in np.argsort(sizes, kind="stable"))
    return next((places for places in operands if places), None)


def _first(lanes: Lanes, node: gs.Node) -> list[Place] | None:
    return _operand(lanes, node, 0)


def _norm(lanes: Lanes, node: gs.Node) -> list[Place] | None:
    """Divide the gain and the shift of a norm over the channels."""
    last = len(lanes.tensor.shape) - 1
    if lanes.axes != (last,) or node.attrs.get("axis", -1) not in (-1, last):
        return None
    return _all([_operand(lanes, node, index) for index in range(1, len(node.inputs))])


def _matmul(lanes: Lanes, node: gs.Node) -> list[Place] | None:
    """Divide columns of a weight; of two tensors, the one that has the channels."""
    x, weight = node.inputs
    last = len(lanes.tensor.shape) - 1
    if isinstance(weight, gs.Constant):
        is_linear = lanes.axes == (last,) and weight.values.ndim == 2
        return [Place(node, 1, 1, lanes.at[0], lanes.channels)] if is_linear else None
    if x.shape is None or weight.shape is None or (last in lanes.axes) == (last - 1 in lanes.axes):
        return None
    tensor = weight if last in lanes.axes else x
    same = len(tensor.shape) == last + 1 and all(tensor.shape[a] == lanes.tensor.shape[a] for a in lanes.axes)
    return _places(lanes._replace(tensor=tensor), {id(node)}) if same and x is not weight else None


def _convolution(lanes: Lanes, node: gs.Node) -> list[Place] | None:
    parameters = all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:])
    if lanes.axes != (1,) or not parameters:
        return None
    return [Place(node, index, 0, lanes.at[0], lanes.channels) for index in range(1, len(node.inputs))]


def _attention(lanes: Lanes, node: gs.Node) -> list[Place] | None:
    """Divide the values, whose rows it mixes; several heads of queries may share those of one head."""
    value = node.inputs[2]
    ranks = {len(tensor.shape) if tensor.shape else 0 for tensor in (value, lanes.tensor)}
    if ranks != {4} or len(node.outputs) != 1 or not {1, 3}.issuperset(lanes.axes) or node.inputs.count(value) != 1:
        return None
    heads, shared = lanes.tensor.shape[1], value.shape[1]
    at = np.array(
        [row // (heads // shared) if axis == 1 else row for axis, row in zip(lanes.axes, lanes.at, strict=True)]
    )
    return _places(lanes._replace(tensor=value, at=at), {id(node)})


def _pad(lanes: Lanes, node: gs.Node) -> list[Place] | None:
    source, pads = node.inputs[0], node.inputs[1]
    if not isinstance(pads, gs.Constant) or node.attrs.get("mode", "constant") != "constant" or source.shape is None:
        return None
    at = lanes.at - np.array([[pads.values[axis]] for axis in lanes.axes])
    inside = (at >= 0) & (at < np.array([[source.shape[axis]] for axis in lanes.axes]))
    return _places(lanes._replace(tensor=source, at=at), {id(node)}) if inside.all() and len(node.inputs) < 4 else None


def _concat(lanes: Lanes, node: gs.Node) -> list[Place] | None:
    if _repeats(node):
        return None
    if axis_of(node) in lanes.axes:
        return _all([_places(part, {id(node)}) for part in concatenated(lanes, node)])
    return _all([_places(lanes._replace(tensor=tensor), {id(node)}) for tensor in node.inputs])


MAKERS: dict[str, Callable[[Lanes, gs.Node], list[Place] | None]] = {
    "Add": _sum,
    "Sub": _sum,
    "Mul": _product,
    "Div": _first,
    "Relu": _first,  # divisors are positive
    "Neg": _first,
    "LayerNormalization": _norm,
    "RMSNormalization": _norm,
    "MatMul": _matmul,
    "Conv": _convolution,
    "Attention": _attention,
    "Pad": _pad,
    "Concat": _concat,
}
