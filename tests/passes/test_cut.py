"""Tests of what the cheapest cut leaves in the loop, and why. Each price is paired with a graph on its other side."""

import json
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from dit_export.cli import main
from dit_export.graph import onnxfile
from dit_export.passes.cut import STEPS
from dit_export.passes.hoist import hoist
from dit_runtime.errors import UsageError
from tests.passes.conftest import Run
from tests.passes.graphs import empty, layer, normal

WIDTH, TOKENS = 64, 12


def joined(product: int = WIDTH) -> gs.Graph:
    """A text [n, L, D] scaled by a vector of the time and projected, beside tokens of the state; like MMDiT's first
    block."""
    graph = empty(x=["n", 16, WIDTH], time=["n", 1, WIDTH], text=["n", TOKENS, WIDTH])
    x, time, text = graph.inputs
    scale = layer(graph, "MatMul", [time, normal(WIDTH, WIDTH)], ["n", 1, WIDTH])
    scaled = layer(graph, "Mul", [layer(graph, "Tanh", [text], text.shape), scale], text.shape)
    inner = layer(graph, "MatMul", [scaled, normal(WIDTH, product)], ["n", TOKENS, product])
    keys = layer(graph, "MatMul", [inner, normal(product, WIDTH)], text.shape)
    both = layer(graph, "Concat", [x, keys], ["n", 16 + TOKENS, WIDTH], axis=1)
    graph.outputs = [layer(graph, "Sigmoid", [both], both.shape)]
    return graph


def test_tokens_that_change_every_step_are_priced_out(run: Run) -> None:
    graph = joined()
    inputs = {"x": normal(2, 16, WIDTH), "time": normal(2, 1, WIDTH), "text": normal(2, TOKENS, WIDTH)}
    (whole,) = run(graph, inputs)
    hoisted = hoist(graph, ["x"], ["time"])
    assert [tensor.shape[1] for tensor in hoisted.invariant.outputs] == [TOKENS, 1]  # tanh(text), and the scale
    priced = [(one.op, one.shape[1:], one.bytes, one.weights) for one in hoisted.cut.priced_out]
    made = STEPS * TOKENS * WIDTH * 4
    weights = WIDTH * WIDTH * 4
    assert priced == [
        ("Mul", (TOKENS, WIDTH), made, 0),
        ("MatMul", (TOKENS, WIDTH), made, weights),
        ("MatMul", (TOKENS, WIDTH), made, weights),
    ]
    assert hoisted.cut.weights == weights and hoisted.cut.bytes == 4 * WIDTH * (TOKENS + STEPS)
    crossed = run(hoisted.invariant, {name: inputs[name] for name in ("time", "text")})
    (again,) = run(hoisted.loop, {"x": inputs["x"], **dict(zip(hoisted.frontier, crossed, strict=True))})
    np.testing.assert_array_equal(again, whole)


@pytest.mark.parametrize("change", ["made once", "more weights"])
def test_the_same_tokens_leave_where_that_is_cheaper(change: str) -> None:
    graph = joined(8 * WIDTH if change == "more weights" else WIDTH)
    hoisted = hoist(graph, ["x"], [] if change == "made once" else ["time"])
    assert not hoisted.cut.priced_out
    assert [tensor.shape[1:] for tensor in hoisted.invariant.outputs] == [[TOKENS, WIDTH]]


def test_a_table_costs_the_rows_that_are_read() -> None:
    """A table of 16 MB would be worth handing over 64 rows of it at each of 30 steps; the rows in the loop are not."""
    table = normal(1000 * WIDTH, WIDTH)
    graph = empty(x=["n", WIDTH, WIDTH], time=["n", WIDTH])
    x, time = graph.inputs
    time.dtype = np.dtype(np.int64)
    rows = layer(graph, "Gather", [table, time], x.shape)
    graph.outputs = [layer(graph, "Add", [x, rows], x.shape)]
    with pytest.raises(UsageError, match="nothing that depends on time alone is worth hoisting"):
        hoist(graph, ["x"], ["time"])

    graph = empty(x=["n", WIDTH, WIDTH], time=["n", WIDTH, len(table)])
    x, time = graph.inputs
    rows = layer(graph, "MatMul", [time, table], x.shape)
    graph.outputs = [layer(graph, "Add", [x, rows], x.shape)]
    assert hoist(graph, ["x"], ["time"]).cut.weights == table.nbytes


def test_booleans_are_computed_where_they_are_needed(run: Run) -> None:
    """One mask for what is made once and for what is made every step: it runs in both, and does not cross."""
    graph = empty(x=["n", 8], c=["n", 8], mask=["n", 8])
    x, c, mask = graph.inputs
    visible = layer(graph, "Greater", [mask, np.array(0.5, np.float32)], ["n", 8], np.bool_)
    zero = np.array(0, np.float32)
    masked = layer(graph, "Where", [visible, c, zero], ["n", 8])
    product = layer(graph, "MatMul", [masked, normal(8, 8)], ["n", 8])
    graph.outputs = [layer(graph, "Add", [layer(graph, "Where", [visible, x, zero], ["n", 8]), product], ["n", 8])]
    inputs = {"x": normal(3, 8), "c": normal(3, 8), "mask": (normal(3, 8) > 0).astype(np.float32)}
    (whole,) = run(graph, inputs)
    hoisted = hoist(graph, ["x"])
    assert hoisted.frontier == (product.name,) and hoisted.cut.direct == ("mask",)
    assert onnxfile.census(hoisted.loop) == {"Greater": 1, "Where": 1, "Add": 1}
    (crossed,) = run(hoisted.invariant, {"c": inputs["c"], "mask": inputs["mask"]})
    (again,) = run(hoisted.loop, {"x": inputs["x"], "mask": inputs["mask"], product.name: crossed})
    np.testing.assert_array_equal(again, whole)


def test_what_has_a_free_dimension_does_not_cross() -> None:
    graph = empty(x=["n", 8], c=["n", "tokens", 8])
    x, c = graph.inputs
    tanh = layer(graph, "Tanh", [c], ["n", "tokens", 8])
    mean = layer(graph, "ReduceMean", [tanh, np.array([1])], ["n", 8], keepdims=0)
    graph.outputs = [layer(graph, "Mul", [x, mean], ["n", 8])]
    assert hoist(graph, ["x"]).frontier == (mean.name,)
    graph.outputs = [layer(graph, "Mul", [x, layer(graph, "ReduceMax", [tanh], [], keepdims=0)], ["n", 8])]
    with pytest.raises(UsageError, match=r"reducemax3: its first dimension is not the rows \(\[\]\)"):
        hoist(graph.cleanup(), ["x"])


def test_vectors_cross_in_the_form_in_which_they_are_packed() -> None:
    """Heads are layout, so keys cross as [n, L, D]; behind a norm of the heads, an op, they cross as they are."""
    for normed in (False, True):
        graph = empty(x=["n", 2, 32, 16], c=["n", TOKENS, WIDTH])
        x, c = graph.inputs
        keys = layer(graph, "MatMul", [c, normal(WIDTH, WIDTH)], c.shape)
        heads = layer(graph, "Reshape", [keys, np.array([0, 0, 2, 32])], ["n", TOKENS, 2, 32])
        if normed:
            heads = layer(graph, "LayerNormalization", [heads, np.ones(32, np.float32)], heads.shape)
        turned = layer(graph, "Transpose", [heads], ["n", 2, TOKENS, 32], perm=[0, 2, 1, 3])
        graph.outputs = [layer(graph, "MatMul", [turned, x], ["n", 2, TOKENS, 16])]
        assert hoist(graph, ["x"]).frontier == ((turned if normed else keys).name,)


def test_the_cut_is_the_same_every_time() -> None:
    first, again = (hoist(joined(), ["x"], ["time"]) for _ in range(2))
    assert first.cut == again.cut


def test_the_command_says_what_left_and_what_was_priced_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxfile.save(joined(), tmp_path / "joined.onnx")
    arguments = ["hoist", str(tmp_path / "joined.onnx"), "--loop-input", "x", "--step-input", "time"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 tensors cross from ")
    assert "crosses, a row: 1 x float32 [12, 64], 1 x float32 [1, 64]" in lines
    assert "priced out: 3 ops with 0.0 MB of weights are cheaper in the loop" in lines
    assert main([*arguments, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["crosses"] == {"float32 [12, 64]": 1, "float32 [1, 64]": 1} and table["direct"] == []
    assert [entry["weights"] for entry in table["priced_out"]] == [0, WIDTH * WIDTH * 4, WIDTH * WIDTH * 4]
    assert main([*arguments[:-1], "tyme"]) == 2
    assert 'did you mean "time"?' in capsys.readouterr().err
