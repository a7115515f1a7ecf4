import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from dit_export.graph import onnxfile
from dit_export.networks.dit import DiT
from dit_export.networks.spec import expected_counts
from dit_export.passes.dependence import Miss
from dit_export.passes.guidance import guide, share_rows
from dit_export.passes.pack import Pack, give, plan, take
from dit_runtime.errors import UsageError
from tests.passes.conftest import Run, fuse_dit
from tests.passes.graphs import empty, layer
from tests.rules import linear

TOLERANCE = 2e-5  # of the largest value: fp32 sums in another order through two blocks; measured 1e-6


def guided_by_torch(model: DiT, x: np.ndarray, t: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Guidance as in the paper's code, written apart from the passes: two runs and one formula on 3 channels."""
    with torch.no_grad():
        own = model(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(labels)).numpy()
        null = model(torch.from_numpy(x), torch.from_numpy(t), torch.full((len(x),), 10)).numpy()
    own[:, :3] = null[:, :3] + weights[:, None, None, None] * (own[:, :3] - null[:, :3])
    return own


@pytest.mark.parametrize("batch", [1, 3])
def test_the_fused_pair_is_guided_pytorch(plain: gs.Graph, small_dit: DiT, run: Run, batch: int) -> None:
    frontier, fused = plain.copy(), fuse_dit(plain, small_dit.spec)
    assert fused.counts.items() <= expected_counts(small_dit.spec).items()
    rng = np.random.default_rng(batch)
    x = rng.normal(size=(batch, 4, 8, 8)).astype(np.float32)
    t = rng.uniform(0, 999, batch).astype(np.float32)
    labels, weights = rng.integers(0, 10, batch), rng.uniform(1, 5, batch).astype(np.float32)
    (conditioner,) = fused.stages
    (rows,) = run(conditioner.graph, {"timesteps": np.tile(t, 2), "labels": np.append(labels, [10] * batch)})
    (pack,) = conditioner.packs
    frontier.outputs = [frontier.tensors()[name] for name in pack.tensors]
    vectors = run(frontier.cleanup(remove_unused_graph_inputs=True), {"timesteps": t, "labels": labels})
    np.testing.assert_allclose(rows[:batch], np.concatenate(vectors, axis=1), rtol=0, atol=1e-5)
    grouped = rows.reshape(2, batch, *rows.shape[1:])

    out = np.concatenate(run(fused.denoiser, {"latents": x, "conditioning": grouped, "guidance": weights}), axis=1)
    expected = guided_by_torch(small_dit, x, t, labels, weights)
    assert np.abs(out - expected).max() <= TOLERANCE * np.abs(expected).max()

    alone = run(fused.denoiser, {"latents": x, "conditioning": grouped[:1], "guidance": weights})
    expected = guided_by_torch(small_dit, x, t, labels, np.ones(batch, np.float32))
    assert np.abs(np.concatenate(alone, axis=1) - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert np.abs(out - expected).max() > 100 * TOLERANCE * np.abs(expected).max()  # guidance shows

    swapped = run(fused.denoiser, {"latents": x, "conditioning": grouped[::-1], "guidance": weights})
    assert np.abs(np.concatenate(swapped, axis=1) - out).max() > 100 * TOLERANCE * np.abs(out).max()


def test_what_no_conditioning_touches_runs_on_the_pictures_rows_only(plain: gs.Graph, small_dit: DiT) -> None:
    denoiser = fuse_dit(plain, small_dit.spec).denoiser
    assert onnxfile.census(denoiser)["Tile"] == 2  # the residual stream and the first LayerNorm's output
    tiled = {node.inputs[0].inputs[0].op for node in denoiser.nodes if node.op == "Tile"}
    assert tiled == {"Add", "LayerNormalization"}
    assert onnxfile.census(denoiser)["Split"] == 1 + 2  # one for all vectors, and one a block for q, k, v
    assert [tensor.name for tensor in denoiser.outputs] == ["prediction", "variance"]


def test_what_has_one_form_travels_together(run: Run) -> None:
    graph = empty(c=["n", 2, 8], d=["n", 1, 4])
    c, d = graph.inputs
    wide = layer(graph, "Tanh", [c], ["n", 2, 8])
    short = layer(graph, "Sigmoid", [layer(graph, "Tanh", [d], ["n", 1, 4])], ["n", 1, 4])
    mask = layer(graph, "ReduceSum", [wide, np.array([2])], ["n", 2], keepdims=0)
    more = layer(graph, "Sigmoid", [c], ["n", 2, 8])
    graph.outputs = [mask, wide, short, more]
    values = [np.random.default_rng(0).normal(size=(3, *t.shape[1:])).astype(np.float32) for t in (c, d)]
    inputs = dict(zip("cd", values, strict=True))
    expected = dict(zip((mask.name, wide.name, short.name, more.name), run(graph, inputs), strict=True))

    packs = plan("context", [graph.outputs])
    assert packs == [
        Pack("context", (wide.name, more.name), (2, 2)),
        Pack("context_1", (short.name,), (1,)),
        Pack("context_2", (mask.name,), (2,)),
    ]
    reader = gs.Graph(inputs=[t.copy() for t in graph.outputs], opset=20, ir_version=10)
    reader.outputs = [layer(reader, "Identity", [t], t.shape) for t in reader.inputs]
    for pack in packs:
        give(graph, pack)
        take(reader, pack)
    reader.inputs[0].shape[0] = graph.outputs[0].shape[0] = "n"
    packed = dict(zip([pack.name for pack in packs], run(graph, inputs), strict=True))
    assert np.array_equal(packed["context"], np.concatenate([expected[wide.name], expected[more.name]], axis=1))
    for got, want in zip(run(reader, packed), expected.values(), strict=True):
        assert np.array_equal(got, want)


def test_a_loop_that_names_its_rows_is_refused() -> None:
    graph = empty(latents=["n", 8], conditioning=["n", 1, 8])
    x, c = graph.inputs
    rows = layer(graph, "Reshape", [x, np.array([2, 1, 8])], [2, 1, 8])
    graph.outputs = [layer(graph, "Mul", [rows, c], [2, 1, 8])]
    with pytest.raises(UsageError, match="reshaped to 2 rows, expected -1"):
        share_rows(graph, "latents", [])


def counted_rows() -> gs.Graph:
    """x + a table repeated to x's own batch size, times what a stage gives."""
    graph = empty(latents=["n", 2, 8], conditioning=["n", 1, 8])
    x, c = graph.inputs
    count = layer(graph, "Shape", [x], [1], np.int64, start=0, end=1)
    target = layer(graph, "Concat", [count, np.array([2, 8])], [3], np.int64, axis=0)
    table = np.arange(16, dtype=np.float32).reshape(1, 2, 8)
    moved = layer(graph, "Add", [x, layer(graph, "Expand", [table, target], ["n", 2, 8])], ["n", 2, 8])
    graph.outputs = [layer(graph, "Mul", [moved, c], ["n", 2, 8])]
    return graph


def turned() -> gs.Graph:
    """Build a graph whose rows are the second axis where a stage's tensor is mixed in."""
    graph = empty(latents=["n", 2, 8], conditioning=["n", 1, 8])
    x, c = graph.inputs
    first, second = (layer(graph, "Transpose", [t], [t.shape[1], "n", 8], perm=[1, 0, 2]) for t in (x, c))
    product = layer(graph, "Mul", [first, second], [2, "n", 8])
    graph.outputs = [layer(graph, "Transpose", [product], ["n", 2, 8], perm=[1, 0, 2])]
    return graph


@pytest.mark.parametrize(
    ("graph", "reason"),
    [(counted_rows(), "reads the batch size inside the loop"), (turned(), "its first axis is not the rows")],
    ids=["batch size", "second axis"],
)
def test_where_rows_cannot_change_the_state_itself_is_repeated(graph: gs.Graph, reason: str, run: Run) -> None:
    rng = np.random.default_rng(0)
    x, c = (rng.normal(size=size).astype(np.float32) for size in ((3, 2, 8), (2, 3, 1, 8)))
    own, null = (run(graph.copy(), {"latents": x, "conditioning": rows})[0] for rows in c)
    misses: list[Miss] = []
    assert share_rows(graph, "latents", misses) == 0
    assert [miss.reason for miss in misses] == [reason]
    assert guide(graph, "latents", linear((2, 8), channels=1)) == 1
    assert onnxfile.census(graph)["Tile"] == 1
    weights = np.array([1, 2, 4], np.float32)
    (out,) = run(graph, {"latents": x, "conditioning": c, "guidance": weights})
    expected = own.copy()
    expected[:, :1] = null[:, :1] + weights[:, None, None] * (own[:, :1] - null[:, :1])
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    (alone,) = run(graph, {"latents": x, "conditioning": c[:1], "guidance": weights})
    np.testing.assert_array_equal(alone, own)


def test_a_changed_exporter_is_noticed(plain: gs.Graph, small_dit: DiT) -> None:
    final = next(node for node in reversed(plain.nodes) if node.op == "LayerNormalization")
    gain = final.outputs[0].outputs[0].inputs[1]  # 1 + scale, of which the pass must find five
    gain.inputs[0].op = "Sub"
    refused = rf"fold_gains: 4, expected 5; refused: {gain.name}: Sub of a scalar, expected Add"
    with pytest.raises(RuntimeError, match=refused):
        fuse_dit(plain, small_dit.spec)
