"""Attention in plain operators, and its projections apart: count, census, numerics, near misses."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from dit_export.graph import onnxfile
from dit_export.passes.attention import masked_attention, plain_attention
from dit_export.passes.qkv import split_qkv
from dit_export.precision.half import cast_to_half
from tests.passes.conftest import Run
from tests.passes.graphs import RNG, empty, layer, normal, projected


def attention(**attrs: object) -> gs.Graph:
    graph = empty(**{name: ["n", 2, 5, 8] for name in "qkv"})
    graph.opset = 23
    graph.outputs = [layer(graph, "Attention", list(graph.inputs), ["n", 2, 5, 8], **attrs)]
    return graph


@pytest.mark.parametrize("attrs", [{}, {"scale": 0.5}], ids=["root of d", "its own scale"])
def test_plain_attention(run: Run, attrs: dict) -> None:
    graph = attention(**attrs)
    inputs = {name: 3 * normal(2, 2, 5, 8) for name in "qkv"}
    (expected,) = run(graph, inputs)
    assert plain_attention(graph) == 1
    assert onnxfile.census(graph) == {"MatMul": 2, "Transpose": 1, "Mul": 1, "Softmax": 1}
    np.testing.assert_allclose(run(graph, inputs)[0], expected, rtol=0, atol=1e-5)
    assert np.abs(run(graph, inputs | {"k": inputs["v"]})[0] - expected).max() > 0.1


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (1, 1, 5, 5), (2, 1, 1, 5), (1, 1, 1, 5), (2, 2, 5, 5)], ids=str)
def test_a_mask_is_added_to_the_scores(run: Run, shape: tuple[int, ...]) -> None:
    graph, whole = attention(), attention()
    for part, size in ((graph, ["n" if shape[0] > 1 else 1, *shape[1:]]), (whole, ["n", 2, 5, 5])):
        mask = gs.Variable("mask", dtype=np.float32, shape=size)
        part.inputs.append(mask)
        part.nodes[0].inputs.append(mask)
    inputs = {name: normal(2, 2, 5, 8) for name in "qkv"} | {"mask": np.zeros(shape, np.float32)}
    inputs["mask"][-1, :, :, 3:] = -10_000
    every = np.ascontiguousarray(np.broadcast_to(inputs["mask"], (2, 2, 5, 5)))
    (expected,) = run(whole, inputs | {"mask": every})  # ONNX Runtime's Attention takes no mask of one row for all
    on_cuda = graph.copy()
    assert masked_attention(on_cuda) == (shape[2] == 1)
    np.testing.assert_allclose(run(on_cuda, inputs)[0], expected, rtol=0, atol=1e-5)
    assert plain_attention(graph) == 1
    assert onnxfile.census(graph) == {"MatMul": 2, "Transpose": 1, "Mul": 1, "Add": 1, "Softmax": 1}
    np.testing.assert_allclose(run(graph, inputs)[0], expected, rtol=0, atol=1e-5)
    inputs["mask"][-1] = 0
    assert np.abs(run(graph, inputs)[0] - expected).max() > 0.1


def test_half_precision_does_not_depend_on_the_batch(run: Run) -> None:
    """125 scores in fp32 are no multiple of 16 bytes, so rows of a batch lie otherwise than a row alone."""
    shape = ["n", 2, 125, 8]
    q, k, v, out = (gs.Variable(name, dtype=np.float32, shape=shape) for name in ("q", "k", "v", "out"))
    node = gs.Node("Attention", "attention", {}, [q, k, v], [out])
    graph = gs.Graph([node], [q, k, v], [out], opset=23, ir_version=10)
    assert cast_to_half(graph, "fp16") == plain_attention(graph) == 1
    values = {name: 3 * normal(4, 2, 125, 8) for name in "qkv"}
    whole = run(graph, values)[0]
    for row in range(4):
        (alone,) = run(graph, {name: rows[row : row + 1] for name, rows in values.items()})
        np.testing.assert_array_equal(whole[row : row + 1], alone)


def test_other_attention_stays() -> None:
    graph = attention(is_causal=1)
    assert plain_attention(graph) == 0
    graph = attention()
    graph.nodes[0].inputs.append(gs.Variable("mask", dtype=np.bool_, shape=[5, 5]))  # which scores count, not a sum
    assert plain_attention(graph) == 0
    graph = attention()
    graph.inputs[1].shape[1] = graph.inputs[2].shape[1] = 1  # both heads of q read one of k and v
    assert plain_attention(graph) == 0


def test_a_mask_that_is_left_out(run: Run) -> None:
    graph = attention()
    graph.nodes[0].inputs.append(gs.Variable.empty())
    inputs = {name: normal(2, 2, 5, 8) for name in "qkv"}
    (expected,) = run(graph, inputs)
    assert plain_attention(graph) == 1
    np.testing.assert_allclose(run(graph, inputs)[0], expected, rtol=0, atol=1e-5)


def test_split_qkv(run: Run) -> None:
    graph = projected()
    inputs = {"x": normal(2, 5, 8)}
    expected, weights = run(graph, inputs), onnxfile.weight_bytes(graph)
    assert split_qkv(graph) == 1
    assert onnxfile.census(graph) == {"MatMul": 3, "Add": 3, "Split": 2}  # of the weight and of the bias
    assert onnxfile.weight_bytes(graph) == weights
    got = run(graph, inputs)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    assert np.abs(got[0] - got[1]).max() > 0.1


def test_split_qkv_of_weights_in_8_bits(run: Run) -> None:
    graph = projected()
    product = graph.nodes[0]
    stored = [RNG.integers(-127, 128, (8, 12)).astype(np.int8), normal(12) ** 2, np.zeros(12, np.int8)]
    product.inputs[1] = layer(graph, "DequantizeLinear", stored, [8, 12], axis=1)
    graph.toposort()
    inputs = {"x": normal(2, 5, 8)}
    expected, weights = run(graph, inputs), onnxfile.weight_bytes(graph)
    assert split_qkv(graph) == 1
    assert onnxfile.census(graph) == {"Split": 4, "DequantizeLinear": 3, "MatMul": 3, "Add": 3}
    assert onnxfile.weight_bytes(graph) == weights  # the parts are no copies
    for one, other in zip(run(graph, inputs), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)  # weights up to 127 times their step
    # A step a row belongs to no column: it is left alone.
    graph = projected()
    graph.nodes[0].inputs[1] = layer(
        graph, "DequantizeLinear", [stored[0], normal(8), np.zeros(8, np.int8)], [8, 12], axis=0
    )
    assert split_qkv(graph) == 0


def test_split_qkv_leaves_other_splits_alone() -> None:
    assert split_qkv(projected(bias=normal(5, 12))) == 0  # no bias of columns
    graph = projected()
    graph.outputs.append(graph.nodes[1].outputs[0])  # read by another
    assert split_qkv(graph) == 0
    graph = projected()
    graph.nodes[2].attrs["axis"] = 1
    assert split_qkv(graph) == 0
