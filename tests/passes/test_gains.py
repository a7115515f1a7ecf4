import numpy as np
import onnx_graphsurgeon as gs
import pytest

from dit_export.graph import onnxfile
from dit_export.passes.gains import fold_gains
from dit_export.passes.hoist import hoist
from tests.passes.conftest import Run
from tests.passes.graphs import empty, layer


def test_every_gain_folds_and_the_vectors_stay(plain: gs.Graph, run: Run) -> None:
    conditioner = hoist(plain, ["latents"]).invariant
    inputs = {"timesteps": np.array([1, 250.5, 999], np.float32), "labels": np.array([0, 10, 3])}
    expected, before = run(conditioner, inputs), onnxfile.census(conditioner)
    assert fold_gains(conditioner) == 2 * 2 + 1
    after = onnxfile.census(conditioner)
    assert before["Add"] - after["Add"] == 5
    assert {op: count for op, count in before.items() if op != "Add"} == {
        op: count for op, count in after.items() if op != "Add"
    }
    for got, want in zip(run(conditioner, inputs), expected, strict=True):
        # (Wc + b) + 1 against Wc + (b + 1): one rounding of values up to 10
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-6)


def linear(graph: gs.Graph, bias: np.ndarray | None = None, **attrs: object) -> gs.Variable:
    weights = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    inputs = [graph.inputs[0], weights] + ([] if bias is None else [bias])
    return layer(graph, "Gemm", inputs, ["n", 8], **attrs)


ONE, BIAS = np.array(1, np.float32), np.arange(8, dtype=np.float32)


def test_a_split_folds_only_its_own_columns(run: Run) -> None:
    graph = empty(c=["n", 8])
    rows = layer(graph, "Unsqueeze", [linear(graph, BIAS), np.array([1])], ["n", 1, 8])
    scale, shift = (gs.Variable(name, dtype=np.float32, shape=["n", 1, 4]) for name in ("scale", "shift"))
    graph.nodes.append(gs.Node("Split", attrs={"axis": -1, "num_outputs": 2}, inputs=[rows], outputs=[scale, shift]))
    graph.outputs = [layer(graph, "Add", [ONE, scale], ["n", 1, 4]), shift]
    inputs = {"c": np.ones((2, 8), np.float32)}
    expected = run(graph, inputs)
    assert fold_gains(graph) == 1
    for got, want in zip(run(graph, inputs), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)  # small integers and halves: almost exact


def test_equal_biases_that_share_a_tensor_fold_apart(run: Run) -> None:
    graph = empty(c=["n", 8])
    shared = gs.Constant("shared", BIAS)
    first, second = linear(graph, shared), linear(graph, shared)
    graph.outputs = [layer(graph, "Add", [first, ONE], ["n", 8]), second]
    inputs = {"c": np.ones((2, 8), np.float32)}
    expected = run(graph, inputs)
    assert fold_gains(graph) == 1
    for got, want in zip(run(graph, inputs), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_a_bias_that_was_left_out_folds(run: Run) -> None:
    graph = empty(c=["n", 8])
    graph.outputs = [layer(graph, "Add", [linear(graph), ONE], ["n", 8])]
    inputs = {"c": np.ones((2, 8), np.float32)}
    expected = run(graph, inputs)
    assert fold_gains(graph) == 1 and onnxfile.census(graph) == {"Gemm": 1}
    np.testing.assert_allclose(run(graph, inputs), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("miss", ["read twice", "a vector", "scaled bias", "not a linear", "an output"])
def test_near_misses_do_not_fold(miss: str) -> None:
    graph = empty(c=["n", 8])
    if miss == "scaled bias":
        scale = linear(graph, BIAS, beta=0.5)
    elif miss == "not a linear":
        scale = layer(graph, "Tanh", [graph.inputs[0]], ["n", 8])
    else:
        scale = linear(graph, BIAS)
    one = np.ones(8, np.float32) if miss == "a vector" else ONE
    graph.outputs = [layer(graph, "Add", [scale, one], ["n", 8])]
    if miss == "read twice":
        graph.outputs.append(layer(graph, "Tanh", [scale], ["n", 8]))
    if miss == "an output":
        graph.outputs.append(scale)
    assert fold_gains(graph) == 0
    assert onnxfile.census(graph)["Add"] == 1
