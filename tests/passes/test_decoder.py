"""Passes on decoders, sub-pixel convolutions and norms of groups: count, census, numerics, near misses."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from dit_export.graph import onnxfile
from dit_export.passes.depth_to_space import depth_to_space
from dit_export.passes.group_norm import group_norm
from dit_export.passes.subpixel import subpixel
from tests.passes.conftest import Run
from tests.passes.graphs import empty, layer, normal

UP = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
CONV = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


def upsampled(scales: tuple[int, ...] = (1, 1, 2, 2), resize: dict | None = None, conv: dict | None = None) -> gs.Graph:
    graph = empty(x=["n", 3, 5, 4])
    doubled = layer(
        graph,
        "Resize",
        [graph.inputs[0], gs.Variable.empty(), np.array(scales, np.float32)],
        ["n", 3, 10, 8],
        **(resize or UP),
    )
    graph.outputs = [layer(graph, "Conv", [doubled, normal(6, 3, 3, 3), normal(6)], ["n", 6, 10, 8], **(conv or CONV))]
    return graph


def test_subpixel(run: Run) -> None:
    graph = upsampled()
    inputs = {"x": normal(2, 3, 5, 4)}
    (expected,) = run(graph, inputs)
    assert subpixel(graph) == 1
    assert onnxfile.census(graph) == {"Conv": 4, "Concat": 1, "DepthToSpace": 1}
    (got,) = run(graph, inputs)
    assert got.shape == expected.shape == (2, 6, 10, 8)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)  # 27 products of size 1 in another order
    first = next(node for node in graph.nodes if node.op == "Conv")
    first.attrs["pads"] = first.attrs["pads"][::-1]  # teeth: one place moved by a pixel
    assert np.abs(run(graph, inputs)[0] - expected).max() > 0.1


@pytest.mark.parametrize(
    "graph",
    [
        upsampled(scales=(1, 1, 4, 4)),
        upsampled(resize=UP | {"mode": "linear", "nearest_mode": "floor"}),
        upsampled(resize=UP | {"coordinate_transformation_mode": "half_pixel"}),
        upsampled(conv=CONV | {"pads": [0, 0, 0, 0]}),
        upsampled(conv=CONV | {"dilations": [2, 2]}),
        upsampled(conv=CONV | {"strides": [2, 2]}),
    ],
    ids=["by four", "linear", "half a pixel off", "unpadded", "dilated", "strided"],
)
def test_subpixel_leaves_other_upsampling_alone(graph: gs.Graph) -> None:
    before = onnxfile.census(graph)
    assert subpixel(graph) == 0 and onnxfile.census(graph) == before


def test_subpixel_needs_the_convolution_to_be_the_only_reader() -> None:
    graph = upsampled()
    graph.outputs.append(graph.nodes[0].outputs[0])
    assert subpixel(graph) == 0


def test_depth_to_space(run: Run) -> None:
    def graph(**attrs: object) -> gs.Graph:
        made = empty(x=["n", 12, 2, 5])
        made.outputs = [layer(made, "DepthToSpace", [made.inputs[0]], ["n", 3, 4, 10], blocksize=2, **attrs)]
        return made

    inputs = {"x": normal(2, 12, 2, 5)}
    (expected,) = run(graph(), inputs)
    rewritten = graph()
    assert depth_to_space(rewritten) == 1
    assert onnxfile.census(rewritten) == {"Reshape": 2, "Transpose": 1}
    np.testing.assert_array_equal(run(rewritten, inputs)[0], expected)
    other = graph(mode="CRD")  # channels before blocks: another order
    assert np.abs(run(other, inputs)[0] - expected).max() > 0.1 and depth_to_space(other) == 0


@pytest.mark.parametrize("size", [[7], [5, 4]], ids=str)
def test_group_norm(run: Run, size: list[int]) -> None:
    graph = empty(x=["n", 8, *size])
    graph.opset = 21
    inputs = {"x": 3 + 2 * normal(2, 8, *size)}
    attrs = {"num_groups": 4, "epsilon": 0.25}
    graph.outputs = [
        layer(graph, "GroupNormalization", [graph.inputs[0], normal(8), normal(8)], ["n", 8, *size], **attrs)
    ]
    (expected,) = run(graph, inputs)
    assert group_norm(graph) == 1 and not {"GroupNormalization", "Transpose"} & set(onnxfile.census(graph))
    np.testing.assert_allclose(run(graph, inputs)[0], expected, rtol=0, atol=1e-5)  # a square of size 20 cancels


def test_group_norm_of_a_group_that_is_far_from_zero(run: Run) -> None:
    """The difference of squares: a mean 100 times the deviation costs four of seven digits, and no more."""
    graph = empty(x=["n", 4, 64, 64])
    graph.opset = 21
    inputs = {"x": 100 + normal(1, 4, 64, 64)}
    graph.outputs = [
        layer(
            graph,
            "GroupNormalization",
            [graph.inputs[0], np.ones(4, np.float32), np.zeros(4, np.float32)],
            ["n", 4, 64, 64],
            num_groups=2,
        )
    ]
    (expected,) = run(graph, inputs)
    group_norm(graph)
    np.testing.assert_allclose(run(graph, inputs)[0], expected, rtol=0, atol=2e-2)


def test_group_norm_of_a_picture_is_the_same_in_a_batch(run: Run) -> None:
    """Channels are last, as ONNX Runtime lays them beside int8 convolutions."""
    graph = empty(x=["n", 16, 16, 32])
    graph.opset = 21
    first = layer(graph, "Transpose", graph.inputs, ["n", 32, 16, 16], perm=[0, 3, 1, 2])
    norm = layer(graph, "GroupNormalization", [first, normal(32), normal(32)], ["n", 32, 16, 16], num_groups=8)
    graph.outputs = [layer(graph, "Transpose", [norm], ["n", 16, 16, 32], perm=[0, 2, 3, 1])]
    assert group_norm(graph) == 1
    pictures = normal(2, 16, 16, 32)
    alone = [run(graph, {"x": picture[None]})[0] for picture in pictures]
    np.testing.assert_array_equal(run(graph, {"x": pictures})[0], np.concatenate(alone))
