"""Typed graphs and their rounding twins."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from dit_export import graphs
from dit_export.fuse import expected_counts, fuse
from dit_export.fuse.narrow import narrow
from dit_export.models.dit import DiT
from dit_export.verify.twin import twin
from tests.fuse.conftest import Run

HALF = np.dtype(np.float16)


@pytest.fixture
def typed(plain: gs.Graph, small_dit: DiT) -> gs.Graph:
    denoiser = fuse(plain, small_dit.spec).denoiser
    assert narrow(denoiser, "fp16") == expected_counts(small_dit.spec)["narrow"] == 5 * 2 + 2
    return denoiser


@pytest.fixture
def inputs(small_dit: DiT) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"latents": (2, 4, 8, 8), "conditioning": (2, 2, 14, 48)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} | {
        "guidance": np.array([1, 4], np.float32)
    }


def test_products_are_narrow_and_islands_wide(typed: gs.Graph) -> None:
    kinds: dict[str, set[str]] = {}
    for node in typed.nodes:
        for tensor in (*node.inputs, *node.outputs):
            if tensor.dtype in (np.float16, np.float32):
                kinds.setdefault(node.op, set()).add(np.dtype(tensor.dtype).name)
    for op in ("MatMul", "Attention", "Conv", "Gelu"):
        assert kinds[op] == {"float16"}, op
    for op in ("LayerNormalization", "Mul", "Tile"):  # modulation and gates among the products
        assert kinds[op] == {"float32"}, op
    inside = {np.dtype(tensor.dtype).name for tensor in (*typed.inputs, *typed.outputs)}
    assert inside == {"float32"}
    weights = [tensor.values for tensor in graphs.constants(typed) if tensor.values.dtype.kind == "f"]
    assert all(values.dtype == HALF for values in weights if values.ndim > 1 and values.shape[0] > 1)


def test_the_graph_checks_and_stays_near(typed: gs.Graph, plain_path, small_dit: DiT, run: Run, inputs: dict) -> None:
    (expected, _) = run(fuse(graphs.load(plain_path), small_dit.spec).denoiser, inputs)
    (got, _) = run(typed, inputs)  # full_check: ONNX's own type inference agrees with ours
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert 1e-6 < error < 5e-3  # eleven bits in two blocks; measured 5e-4


def test_the_twin_rounds_what_the_typed_graph_holds(typed: gs.Graph, run: Run, inputs: dict) -> None:
    casts = graphs.census(typed)["Cast"]
    (near, _) = run(typed, inputs)
    rounded = twin(typed, HALF)
    assert rounded > 5 * 2 + 2 and graphs.census(typed)["Cast"] > 2 * casts
    assert not [tensor.name for tensor in graphs.constants(typed) if tensor.values.dtype == HALF]
    (got, _) = run(typed, inputs)
    assert np.linalg.norm(got - near) / np.linalg.norm(near) < 5e-3


def test_an_overflow_shows_in_the_twin_alone(run: Run) -> None:
    """300 x 300 is beyond fp16: a CPU's fp16 product hides it, the twin does not."""
    x = gs.Variable("x", dtype=np.float32, shape=["n", 4])
    y = gs.Variable("y", dtype=np.float32, shape=["n", 4])
    z = gs.Variable("z", dtype=np.float32, shape=["n", 4])
    product = gs.Node("MatMul", "product", {}, [x, gs.Constant("w", np.eye(4, dtype=np.float32) * 300)], [y])
    scaled = gs.Node("Mul", "scaled", {}, [y, gs.Constant("s", np.array(1e-3, np.float32))], [z])
    graph = gs.Graph([product, scaled], [x], [z], opset=23, ir_version=10)
    inputs = {"x": np.full((1, 4), 300, np.float32)}
    assert narrow(graph, "fp16") == 1
    assert graph.nodes[-1].inputs[0].inputs[0].attrs["to"] == onnx.TensorProto.FLOAT
    twin(graph, HALF)
    assert np.isinf(run(graph, inputs)[0]).all()
    assert np.isfinite(run(graph, {"x": inputs["x"] / 2})[0]).all()
