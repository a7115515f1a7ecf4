from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from dit_export.graph import onnxfile, trace
from dit_export.networks.dit import DiT, dit_network
from dit_export.networks.spec import CONDITIONINGS, with_conditioning
from dit_export.passes.hoist import hoist
from dit_runtime.errors import UsageError
from tests.passes.conftest import SMALL, Run, ports_of, random_inputs, sensitive
from tests.passes.graphs import empty, layer

DEPTH = SMALL.depth
CROSSING = {
    "adaln-zero": 6 * DEPTH + 2,
    "adaln": 4 * DEPTH + 2,
    "in-context": 1,  # both tokens at once
    "cross-attention": 2 * DEPTH,  # keys and values
}


@pytest.mark.parametrize("conditioning", list(CONDITIONINGS))
def test_the_halves_together_are_the_whole(conditioning: str, tmp_path: Path, run: Run) -> None:
    model = sensitive(DiT(replace(with_conditioning(SMALL, conditioning), embedders=1)))
    trace.trace_network(dit_network(model)).save(tmp_path / "dit.onnx", external_data=True)
    graph = onnxfile.load(tmp_path / "dit.onnx")
    inputs = random_inputs(ports_of(model.spec))
    (whole,) = run(graph, inputs)

    hoisted = hoist(graph, ["latents"], ["timesteps"])
    assert len(hoisted.frontier) == CROSSING[conditioning] and not hoisted.cut.direct and not hoisted.cut.priced_out
    ahead = {name: inputs[name] for name in inputs if name != "latents"}
    frontier = dict(zip(hoisted.frontier, run(hoisted.invariant, ahead), strict=True))
    (again,) = run(hoisted.loop, {"latents": inputs["latents"], **frontier})
    np.testing.assert_array_equal(again, whole)

    first = hoisted.frontier[0]  # teeth: one wrong vector shows
    (broken,) = run(hoisted.loop, {"latents": inputs["latents"], **frontier, first: -frontier[first]})
    assert np.abs(broken - whole).max() > 1e-3 * np.abs(whole).max()


def test_it_takes_all_of_adaln_and_nothing_of_the_loop(plain: gs.Graph, small_dit: DiT) -> None:
    gemms = onnxfile.census(plain)["Gemm"]  # embedders' and adaLN's: the linears on (N, D)
    hoisted = hoist(plain, ["latents"], ["timesteps"])
    before, loop = onnxfile.census(hoisted.invariant), onnxfile.census(hoisted.loop)
    assert len(hoisted.frontier) == small_dit.spec.num_vectors == 14
    assert before["Gemm"] == gemms
    assert not {"Gemm", "Sin", "Cos", "Gather", "Sigmoid", "Unsqueeze"} & set(loop)
    assert not {"MatMul", "Attention", "LayerNormalization", "Gelu", "Conv"} & set(before)
    assert [tensor.name for tensor in hoisted.invariant.inputs] == ["timesteps", "labels"]
    assert [tensor.name for tensor in hoisted.loop.inputs] == ["latents", *hoisted.frontier]


def test_the_cut_moves_back_through_layout_and_repetition() -> None:
    graph = empty(x=["n", 4, 8], c=["n", 4, 8])
    x, c = graph.inputs
    keys = layer(graph, "Tanh", [c], ["n", 4, 8])
    heads = layer(graph, "Reshape", [keys, np.array([-1, 4, 2, 4])], ["n", 4, 2, 4])
    turned = layer(graph, "Transpose", [heads], ["n", 2, 4, 4], perm=[0, 2, 3, 1])
    queries = layer(graph, "Reshape", [x, np.array([-1, 2, 4, 4])], ["n", 2, 4, 4])
    graph.outputs = [layer(graph, "MatMul", [queries, turned], ["n", 2, 4, 4])]
    hoisted = hoist(graph, ["x"])
    assert hoisted.frontier == (keys.name,)  # not the transposed heads
    assert onnxfile.census(hoisted.loop) == {"Reshape": 2, "Transpose": 1, "MatMul": 1}

    graph = empty(x=["n", 64, 8], c=["n", 1, 8])
    x, c = graph.inputs
    one = layer(graph, "Tanh", [c], ["n", 1, 8])
    many = layer(graph, "Expand", [one, np.array([1, 64, 8])], ["n", 64, 8])
    graph.outputs = [layer(graph, "Mul", [x, many], ["n", 64, 8])]
    assert hoist(graph, ["x"]).frontier == (one.name,)  # 1 vector travels, not 64


def test_near_misses_stay_in_the_loop() -> None:
    graph = empty(x=["n", 1, 8], c=["n", 1, 8])
    x, c = graph.inputs
    mixed = layer(graph, "Add", [layer(graph, "Tanh", [c], ["n", 1, 8]), x], ["n", 1, 8])  # c, but with x in it
    graph.outputs = [layer(graph, "Sigmoid", [mixed], ["n", 1, 8])]
    hoisted = hoist(graph, ["x"])
    assert onnxfile.census(hoisted.invariant) == {"Tanh": 1}
    assert onnxfile.census(hoisted.loop) == {"Add": 1, "Sigmoid": 1}

    graph = empty(x=["n", 1, 8], c=["n", 1, 8])
    x, c = graph.inputs
    graph.outputs = [layer(graph, "Sigmoid", [layer(graph, "Add", [c, x], ["n", 1, 8])], ["n", 1, 8])]
    with pytest.raises(UsageError, match="nothing that depends on c alone is worth hoisting"):
        hoist(graph, ["x"])


def test_row_counts_are_taken_from_the_loop() -> None:
    def reshaped_by(axis: int, rows: str = "n") -> gs.Graph:
        graph = empty(x=["n", 2, 8], c=[rows, 16])
        x, c = graph.inputs
        shape = layer(graph, "Shape", [c], [2], np.int64)
        count = layer(graph, "Gather", [shape, np.array([axis])], [1], np.int64, axis=0)
        target = layer(graph, "Concat", [count, np.array([-1])], [2], np.int64, axis=0)
        rows = layer(graph, "Reshape", [x, target], ["n", "m"])
        graph.outputs = [layer(graph, "Mul", [rows, layer(graph, "Tanh", [c], ["n", 16])], ["n", 16])]
        return graph

    hoisted = hoist(reshaped_by(0), ["x"])
    assert onnxfile.census(hoisted.loop)["Shape"] == 1
    assert len(hoisted.frontier) == 1
    assert hoisted.cut.direct == ()
    for other in (reshaped_by(1), reshaped_by(0, rows="m")):  # a width, and rows that x does not have
        hoisted = hoist(other, ["x"])
        assert hoisted.cut.direct == ("c",)
        shape = next(node for node in hoisted.loop.nodes if node.op == "Shape")
        assert shape.inputs[0].name == "c"


@pytest.mark.parametrize("counted", ["c", "tanh", "x"])
def test_row_counts_bind_no_work_to_the_loop(run: Run, counted: str) -> None:
    """One count of rows, of whichever tensor, shapes what is invariant and what is not."""
    graph = empty(x=["n", 16], c=["n", 16])
    x, c = graph.inputs
    tanh = layer(graph, "Tanh", [c], ["n", 16])
    shape = layer(graph, "Shape", [{"c": c, "tanh": tanh, "x": x}[counted]], [2], np.int64)
    count = layer(graph, "Gather", [shape, np.array([0])], [1], np.int64, axis=0)
    target = layer(graph, "Concat", [count, np.array([4, 4])], [3], np.int64, axis=0)
    keys, queries = (layer(graph, "Reshape", [tensor, target], ["n", 4, 4]) for tensor in (tanh, x))
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    product = layer(graph, "MatMul", [keys, weight], ["n", 4, 4])
    graph.outputs = [layer(graph, "Mul", [queries, product], ["n", 4, 4])]
    arrays = {name: np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32) for name in ("x", "c")}
    (whole,) = run(graph, arrays)

    hoisted = hoist(graph, ["x"])
    assert hoisted.frontier == (product.name,)
    assert not {"MatMul", "Tanh"} & set(onnxfile.census(hoisted.loop))
    (crossed,) = run(hoisted.invariant, {"c": arrays["c"]})
    (again,) = run(hoisted.loop, {"x": arrays["x"], product.name: crossed})
    np.testing.assert_array_equal(again, whole)


def test_what_has_a_computed_shape_is_no_shape() -> None:
    graph = empty(x=["n", 4, 4], captions=["n", "tokens", 4])
    x, captions = graph.inputs
    tokens = layer(graph, "Shape", [captions], [1], np.int64, start=1, end=2)
    target = layer(graph, "Concat", [np.array([-1]), tokens, np.array([2, 2])], [4], np.int64, axis=0)
    keys = layer(graph, "MatMul", [captions, np.ones((4, 4), np.float32)], ["n", "tokens", 4])
    heads = layer(graph, "Reshape", [keys, target], ["n", "tokens", 2, 2])
    means = layer(graph, "ReduceMean", [heads, np.array([1, 2])], ["n", 1, 1, 2])
    graph.outputs = [layer(graph, "Mul", [layer(graph, "Reshape", [x, np.array([-1, 8, 2, 1])], [8]), means], [8])]
    assert hoist(graph, ["x"]).frontier == (means.name,)


def test_other_sizes_are_not_taken_for_row_counts(run: Run) -> None:
    """Shape(c, start=1)[0] is c's width: rewritten to x's it would be a wrong number."""
    graph = empty(x=["n", 4], c=["n", 7])
    x, c = graph.inputs
    width = layer(graph, "Gather", [layer(graph, "Shape", [c], [1], np.int64, start=1), np.array([0])], [1], np.int64)
    scale = layer(graph, "Cast", [width], [1], to=1)
    product = layer(graph, "MatMul", [c, np.ones((7, 4), np.float32)], ["n", 4])
    graph.outputs = [layer(graph, "Add", [product, layer(graph, "Mul", [x, scale], ["n", 4])], ["n", 4])]
    arrays = {name: np.random.default_rng(1).normal(size=(3, n)).astype(np.float32) for name, n in (("x", 4), ("c", 7))}
    (whole,) = run(graph, arrays)
    hoisted = hoist(graph, ["x"])
    assert hoisted.frontier == (product.name,) and hoisted.cut.direct == ("c",)
    (crossed,) = run(hoisted.invariant, {"c": arrays["c"]})
    (again,) = run(hoisted.loop, {**arrays, product.name: crossed})
    np.testing.assert_array_equal(again, whole)


def test_optional_inputs_and_outputs_that_are_left_out() -> None:
    graph = empty(x=["n", 8], c=["n", 8])
    x, c = graph.inputs
    limit = layer(graph, "ReduceMax", [c], [], keepdims=0)
    capped = gs.Variable("capped", dtype=np.float32, shape=["n", 8])
    graph.nodes.append(gs.Node("Clip", inputs=[x, gs.Variable.empty(), limit], outputs=[capped]))
    graph.outputs = [capped]
    normed = gs.Variable("normed", dtype=np.float32, shape=["n", 8])  # its first output is not wanted
    graph.nodes.insert(0, gs.Node("Split", attrs={"num_outputs": 1}, inputs=[c], outputs=[normed]))
    graph.nodes[0].outputs.insert(0, gs.Variable.empty())
    graph.nodes[1].inputs[0] = normed
    hoisted = hoist(graph, ["x"])
    assert hoisted.frontier == (normed.name,)  # the limit is a scalar, and has no rows
    assert onnxfile.census(hoisted.loop) == {"ReduceMax": 1, "Clip": 1}
    (miss,) = hoisted.cut.misses
    assert miss.node == limit.name and "not the rows" in miss.reason


def test_refusals_name_the_input(plain: gs.Graph) -> None:
    with pytest.raises(UsageError, match=r"no input 'latent' \(did you mean \"latents\"\?\)"):
        hoist(plain, ["latent"])
    with pytest.raises(UsageError, match=r"every input .* is a loop input"):
        hoist(plain, ["latents", "timesteps", "labels"])
