"""Products in integers: exact, of one tensor for all readers, near misses."""

import platform
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import TensorProto

from dit_export.graph import onnxfile
from dit_export.passes.integer_products import integer_products
from tests.passes.conftest import Run
from tests.passes.graphs import RNG, empty, layer, normal, projected

STEP = np.float32(0.05)  # of the activations' grid


def quantized(products: int = 1, steps: tuple[float, ...] = (STEP,), bias: bool = True, gelu: bool = False) -> gs.Graph:
    """x W + b between Q/DQ, as `precision/qdq.py` writes it; all products read one x, or GELU(x)."""
    graph = empty(x=["n", 5, 96])
    graph.opset = 21
    read = layer(graph, "Gelu", [graph.inputs[0]], ["n", 5, 96], approximate="tanh") if gelu else graph.inputs[0]
    for number in range(products):
        grid = [np.array(steps[number % len(steps)], np.float32), np.zeros((), np.int8)]
        whole = layer(graph, "QuantizeLinear", [read, *grid], ["n", 5, 96], np.int8)
        x = layer(graph, "DequantizeLinear", [whole, *grid], ["n", 5, 96])
        stored = [RNG.integers(-127, 128, (96, 24)).astype(np.int8), normal(24) ** 2 + 0.01, np.zeros(24, np.int8)]
        product = layer(graph, "MatMul", [x, layer(graph, "DequantizeLinear", stored, [96, 24], axis=1)], ["n", 5, 24])
        graph.outputs.append(layer(graph, "Add", [product, normal(24)], ["n", 5, 24]) if bias else product)
    return graph


def whole_products(graph: gs.Graph, x: np.ndarray) -> list[np.ndarray]:
    """Return what each product is in exact arithmetic, from the graph's own constants."""
    answers = []
    for node in [node for node in graph.nodes if node.op == "MatMul"]:
        (quantize,) = node.inputs[0].inputs[0].inputs[0].inputs
        step, (stored,) = float(quantize.inputs[1].values), node.inputs[1].inputs
        grid = np.clip(np.rint(x / np.float32(step)), -128, 127).astype(np.int64)
        integers = grid @ np.asarray(stored.inputs[0].values).astype(np.int64)
        (add,) = node.outputs[0].outputs
        answers.append(step * integers * stored.inputs[1].values.astype(np.float64) + add.inputs[1].values)
    return answers


@pytest.mark.parametrize("without_vnni", [False, True], ids=["as it is", "as on a CPU without VNNI"])
def test_integer_products_are_exact(tmp_path: Path, without_vnni: bool) -> None:
    """Inputs that reach past both ends of the grid; what a CPU without VNNI is told to do reaches this op, too."""
    graph, x = quantized(2), normal(3, 5, 96) * 4
    x[:, 0] = 10  # 5 times the end of the grid: pairs of products leave 16 bits
    expected = whole_products(graph, x)
    assert integer_products(graph) == 2
    onnxfile.save(graph, tmp_path / "graph.onnx")
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    if without_vnni:
        settings.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", settings)
    for got, want in zip(session.run(None, {"x": x}), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())  # of one rounding to fp32
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    weights = {tensor.data_type for tensor in optimized.initializer if list(tensor.dims) == [96, 24]}
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    assert weights == {TensorProto.UINT8 if without_vnni and x86 else TensorProto.INT8}


def test_the_grid_of_a_gelu_has_its_levels_where_values_are(run: Run) -> None:
    """Half of a symmetric grid would lie below the least value of a GELU."""
    graph, x = quantized(gelu=True), np.clip(2 * normal(3, 5, 96), -6, 6)  # the grid ends at 6.35
    portable = graph.copy()
    weights, steps, _ = (tensor.values for tensor in graph.nodes[3].inputs)
    bias = graph.nodes[-1].inputs[1].values
    gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)))
    expected = gelu @ (weights.astype(np.float64) * steps) + bias
    assert integer_products(graph) == 1
    _, step, zero = next(node for node in graph.nodes if node.op == "QuantizeLinear").inputs
    low, high = -int(zero.values) * float(step.values), (255 - int(zero.values)) * float(step.values)
    assert -0.25 < low <= gelu.min() and 127 * STEP <= high * (1 + 1e-6) < 1.03 * 127 * STEP
    errors = [np.linalg.norm(run(form, {"x": x})[0] - expected) for form in (graph, portable)]
    assert errors[0] < 0.6 * errors[1]
    graph = quantized(gelu=True, steps=(0.001,))  # ends before -0.17: both ends are cut at the same magnitude
    integer_products(graph)
    assert next(node for node in graph.nodes if node.op == "QuantizeLinear").inputs[2].values == 128


def test_integer_products_share_the_u8_tensor() -> None:
    graph = quantized(3)
    weights = onnxfile.weight_bytes(graph)
    assert integer_products(graph) == 3
    assert onnxfile.census(graph) == {"MatMulIntegerToFloat": 3, "QuantizeLinear": 1}
    assert onnxfile.weight_bytes(graph) <= weights
    graph = quantized(3, steps=(STEP, 2 * STEP))  # a grid of its own needs a tensor of its own
    assert integer_products(graph) == 3
    assert onnxfile.census(graph) == {"MatMulIntegerToFloat": 3, "QuantizeLinear": 2}


def test_integer_products_of_a_row_do_not_depend_on_its_batch(run: Run) -> None:
    graph, x = quantized(), normal(3, 5, 96)
    x[1:] *= 50  # the others are far outside of the grid
    integer_products(graph)
    (batch,), (alone,) = run(graph, {"x": x}), run(graph, {"x": x[:1]})
    assert np.array_equal(batch[:1], alone)


def test_an_integer_product_needs_no_bias(run: Run) -> None:
    """The addend may be no bias: here it is a number for each token."""
    graph, x = quantized(bias=False), normal(3, 5, 96)
    graph.outputs = [layer(graph, "Add", [graph.outputs[0], normal(5, 24)], ["n", 5, 24])]
    (expected,) = run(graph.copy(), {"x": x})
    assert integer_products(graph) == 1
    assert onnxfile.census(graph) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Add": 1}
    (got,) = run(graph, {"x": x})
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def convolution(kernel: int, zero: int = 0) -> gs.Graph:
    """A convolution and its bias between Q/DQ."""
    graph = empty(x=["n", 32, 6, 6])
    graph.opset = 21
    grid = [np.array(STEP, np.float32), np.array(zero, np.int8)]
    whole = layer(graph, "QuantizeLinear", [graph.inputs[0], *grid], ["n", 32, 6, 6], np.int8)
    x = layer(graph, "DequantizeLinear", [whole, *grid], ["n", 32, 6, 6])
    shape = [24, 32, kernel, kernel]
    stored = [RNG.integers(-127, 128, shape).astype(np.int8), normal(24) ** 2 + 0.01, np.zeros(24, np.int8)]
    weight = layer(graph, "DequantizeLinear", stored, shape, axis=0)
    side = 7 - kernel
    graph.outputs = [layer(graph, "Conv", [x, weight, normal(24)], ["n", 24, side, side])]
    return graph


def test_a_convolution_of_one_pixel_is_an_integer_product(run: Run) -> None:
    graph, x = convolution(1), normal(2, 32, 6, 6)
    (expected,), weights = run(graph.copy(), {"x": x}), onnxfile.weight_bytes(graph)
    assert integer_products(graph) == 1 and "Conv" not in onnxfile.census(graph)
    assert onnxfile.weight_bytes(graph) <= weights + 64  # shapes
    (got,) = run(graph, {"x": x})
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_other_products_stay_float() -> None:
    assert integer_products(convolution(3)) == integer_products(convolution(1, zero=5)) == 0
    assert integer_products(projected()) == 0  # no Q/DQ
    graph = quantized()
    activations = next(node for node in graph.nodes if node.op == "DequantizeLinear")
    activations.inputs[0] = gs.Variable("given", dtype=np.int8, shape=["n", 5, 96])  # no Q: its step is not known
    graph.inputs.append(activations.inputs[0])
    assert integer_products(graph) == 0
