"""Places that can be divided instead of a layer's input, on handmade graphs; each near-miss divides nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from dit_export.graph import onnxfile
from dit_export.precision.layers import find, own_weights
from dit_export.precision.makers import Group, grouped

TOKENS, CHANNELS = 6, 8


class Builder:
    """A graph between a first and a last product, with a pack of vectors from before the loop."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        state = gs.Variable("state", np.float32, ["batch", TOKENS, CHANNELS])
        pack = gs.Variable("pack", np.float32, ["groups", "batch", 3, CHANNELS])
        self.graph = gs.Graph(inputs=[state, pack], outputs=[])
        rows = self.add("Reshape", ["rows", 3, CHANNELS], pack, np.array([-1, 3, CHANNELS]))
        self.vectors = [gs.Variable(f"vector{n}", np.float32, ["rows", 1, CHANNELS]) for n in range(3)]
        self.graph.nodes.append(gs.Node("Split", "split", {"axis": 1}, [rows, np_sizes()], self.vectors))
        self.x = self.linear("first", state)
        self.norm = self.add("LayerNormalization", self.shape(), self.x, np.ones(CHANNELS, np.float32), axis=-1)

    def shape(self, channels: int = CHANNELS, tokens: int = TOKENS) -> list[str | int]:
        return ["rows", tokens, channels]

    def add(self, op: str, shape: Sequence[str | int], *inputs: gs.Tensor | np.ndarray, **attrs: object) -> gs.Variable:
        tensor = onnxfile.layer(self.graph, op, inputs, f"{op}{len(self.graph.nodes)}", **attrs)
        tensor.dtype, tensor.shape = np.dtype(np.float32), list(shape)
        return tensor

    def linear(self, name: str, x: gs.Tensor, width: int = CHANNELS) -> gs.Variable:
        values = self.rng.normal(size=(x.shape[-1], width)).astype(np.float32)
        return self.add("MatMul", [*x.shape[:-1], width], x, gs.Constant(f"{name}.weight", values))

    def groups(self, *results: gs.Tensor) -> list[Group]:
        self.graph.outputs += [self.linear(f"last{n}", result) for n, result in enumerate(results)]
        return [group for group in grouped(find(self.graph)) if group.layers[0].name.startswith("layer")]


def np_sizes() -> gs.Constant:
    return gs.Constant("sizes", np.ones(3, np.int64))


def modulated(make: Builder) -> gs.Variable:
    scaled = make.add("Mul", make.shape(), make.norm, make.vectors[0])
    return make.add("Add", make.shape(), scaled, make.vectors[1])


def a_norm(make: Builder) -> list[gs.Variable]:
    return [make.linear("layer", modulated(make))]


def a_norm_that_others_read(make: Builder) -> list[gs.Variable]:
    x = modulated(make)
    return [make.add("Add", make.shape(), make.linear("layer", x), x)]


def a_vector_that_others_read(make: Builder) -> list[gs.Variable]:
    result = make.linear("layer", modulated(make))
    return [make.add("Mul", make.shape(), result, make.vectors[1])]


def blocks_with_one_modulation(make: Builder) -> list[gs.Variable]:
    results = []
    for n in range(2):
        norm = make.add("LayerNormalization", make.shape(), make.x, np.ones(CHANNELS, np.float32), axis=-1)
        scaled = make.add("Mul", make.shape(), norm, make.vectors[0])
        results.append(make.linear(f"layer{n}", make.add("Add", make.shape(), scaled, make.vectors[1])))
    return results


def the_residual_stream(make: Builder) -> list[gs.Variable]:
    x = make.add("Add", make.shape(), make.x, make.linear("inner", modulated(make)))
    return [make.add("Add", make.shape(), make.linear("layer", x), x)]


def a_square(make: Builder) -> list[gs.Variable]:
    made = make.linear("inner", modulated(make))
    return [make.linear("layer", make.add("Mul", make.shape(), made, made))]


def a_gate(make: Builder) -> list[gs.Variable]:
    x = modulated(make)
    gate = make.add("Sigmoid", make.shape(), make.linear("gate", x))
    return [make.linear("layer", make.add("Mul", make.shape(), gate, make.linear("inner", x)))]


def two_gates(make: Builder) -> list[gs.Variable]:
    x = modulated(make)
    gates = [make.add("Sigmoid", make.shape(), make.linear(name, x)) for name in ("gate", "inner")]
    return [make.linear("layer", make.add("Mul", make.shape(), *gates))]


def sliced(make: Builder, x: gs.Tensor, first: int, last: int, axis: int) -> gs.Variable:
    shape = [last - first if n == axis else size for n, size in enumerate(x.shape)]
    return make.add("Slice", shape, x, *(np.array([value]) for value in (first, last, axis, 1)))


def parts_of_the_tokens(make: Builder) -> list[gs.Variable]:
    x = modulated(make)
    return [make.linear(f"layer{n}", sliced(make, x, 3 * n, 3 * n + 3, axis=1)) for n in range(2)]


def a_part_of_the_tokens(make: Builder) -> list[gs.Variable]:
    x = modulated(make)
    return [make.linear("layer", sliced(make, x, 0, 3, axis=1)), sliced(make, x, 3, 6, axis=1)]


def moved_for_others(make: Builder) -> list[gs.Variable]:
    """Another node reads the moved norm, no longer the norm itself."""
    moved = make.add("Reshape", make.shape(), modulated(make), np.array([-1, TOKENS, CHANNELS]))
    return [make.add("Add", make.shape(), make.linear("layer", moved), moved)]


def split_for_others(make: Builder) -> list[gs.Variable]:
    parts = [gs.Variable(f"part{n}", np.float32, make.shape(tokens=3)) for n in range(2)]
    sizes = gs.Constant("halves", np.array([3, 3]))
    make.graph.nodes.append(gs.Node("Split", "halves", {"axis": 1}, [modulated(make), sizes], parts))
    return [make.linear("layer", parts[1]), make.add("Sigmoid", parts[0].shape, parts[0])]


def a_sum_of_one_tensor(make: Builder) -> list[gs.Variable]:
    made = make.linear("inner", modulated(make))
    return [make.linear("layer", make.add("Add", make.shape(), made, made))]


def tokens_twice(make: Builder) -> list[gs.Variable]:
    made = make.linear("inner", modulated(make))
    return [make.linear("layer", make.add("Concat", make.shape(tokens=2 * TOKENS), made, made, axis=1))]


def channels_twice(make: Builder) -> list[gs.Variable]:
    made = make.linear("inner", modulated(make), CHANNELS // 2)
    return [make.linear("layer", make.add("Concat", make.shape(), made, made, axis=2))]


def channels_twice_behind_a_relu(make: Builder) -> list[gs.Variable]:
    made = make.linear("inner", modulated(make), CHANNELS // 2)
    twice = make.add("Concat", make.shape(), made, made, axis=2)
    return [make.linear("layer", make.add("Relu", make.shape(), twice))]


def halves_of_the_channels(make: Builder) -> list[gs.Variable]:
    made = make.linear("inner", modulated(make), 2 * CHANNELS)
    gate = make.add("Sigmoid", make.shape(), sliced(make, made, 0, CHANNELS, axis=2))
    return [make.linear("layer", make.add("Mul", make.shape(), gate, sliced(make, made, CHANNELS, 2 * CHANNELS, 2)))]


def overlapping_channels(make: Builder) -> list[gs.Variable]:
    made = make.linear("inner", modulated(make), 2 * CHANNELS)
    gate = make.add("Sigmoid", make.shape(), sliced(make, made, 1, CHANNELS + 1, axis=2))
    return [make.linear("layer", make.add("Mul", make.shape(), gate, sliced(make, made, CHANNELS, 2 * CHANNELS, 2)))]


def heads(make: Builder) -> list[gs.Variable]:
    made, split, perm = make.linear("inner", modulated(make)), ["rows", TOKENS, 2, 4], [0, 2, 1, 3]
    apart = make.add("Reshape", split, made, np.array([-1, *split[1:]]))
    moved = make.add("Transpose", [split[axis] for axis in perm], apart, perm=perm)
    back = make.add("Transpose", split, make.add("Relu", moved.shape, moved), perm=perm)
    return [make.linear("layer", make.add("Reshape", make.shape(), back, np.array([-1, TOKENS, CHANNELS])))]


def channels_mixed_with_tokens(make: Builder) -> list[gs.Variable]:
    made = make.linear("inner", modulated(make))
    turned = make.add("Transpose", ["rows", CHANNELS, TOKENS], made, perm=[0, 2, 1])
    return [make.linear("layer", make.add("Reshape", make.shape(), turned, np.array([-1, TOKENS, CHANNELS])))]


@pytest.mark.parametrize(
    ("build", "divided"),
    [
        (a_norm, ["Mul", "Add"]),
        (a_norm_that_others_read, []),
        (a_vector_that_others_read, []),
        (blocks_with_one_modulation, ["Mul", "Add", "Mul", "Add"]),
        (the_residual_stream, []),
        (a_gate, ["MatMul"]),
        (two_gates, []),
        (a_square, []),
        (parts_of_the_tokens, ["Mul", "Add"]),
        (a_part_of_the_tokens, []),
        (moved_for_others, []),
        (split_for_others, []),
        (a_sum_of_one_tensor, []),
        (tokens_twice, []),
        (channels_twice, []),
        (channels_twice_behind_a_relu, []),
        (halves_of_the_channels, ["MatMul"]),
        (overlapping_channels, []),
        (heads, ["MatMul"]),
        (channels_mixed_with_tokens, []),
    ],
)
def test_what_can_be_divided(build: Callable[[Builder], list[gs.Variable]], divided: list[str]) -> None:
    make = Builder()
    (group,) = make.groups(*build(make))
    assert [place.node.op for place in group.places] == divided
    assert len(group.channels) == (CHANNELS if divided else 0)
    offset = CHANNELS if build is halves_of_the_channels else 0
    for place in group.places:
        np.testing.assert_array_equal(place.at, place.channels + offset)
    assert len(group.inputs) == (2 if build in (parts_of_the_tokens, blocks_with_one_modulation) else 1)


def test_a_weight_that_two_layers_read() -> None:
    make = Builder()
    x = make.linear("layer", modulated(make))
    weight = make.graph.nodes[-1].inputs[1]
    result = make.add("MatMul", make.shape(), make.add("Gelu", make.shape(), x), weight)
    make.groups(result)
    layers = find(make.graph)
    assert [layer.name for layer in layers] == ["layer", "layer-2"]
    own_weights(layers)
    assert [layer.name for layer in find(make.graph)] == ["layer", "layer-2"]
    assert [layer.node.inputs[1].name for layer in layers] == ["layer.weight", "layer-2.weight"]
    assert layers[0].node.inputs[1] is not layers[1].node.inputs[1]
