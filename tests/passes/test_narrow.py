"""Typed graphs and their rounding twins."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx.helper import tensor_dtype_to_np_dtype

from dit_export.graph import onnxfile
from dit_export.networks.dit import DiT
from dit_export.networks.spec import expected_counts
from dit_export.passes.attention import plain_attention, scores_of
from dit_export.precision.half import PRODUCTS, TYPES, Rounded, cast_to_half, fp32_products, half_tensors
from dit_export.precision.layers import find
from dit_export.precision.qdq import quantize
from dit_export.precision.smooth import Chosen
from dit_export.precision.twin import half_form, twin
from dit_runtime.bundle.manifest import Stage
from tests.passes.conftest import Run, fuse_dit

HALF = np.dtype(np.float16)


@pytest.fixture
def typed(plain: gs.Graph, small_dit: DiT) -> gs.Graph:
    denoiser = fuse_dit(plain, small_dit.spec).denoiser
    assert cast_to_half(denoiser, "fp16") == expected_counts(small_dit.spec)["cast_to_half"] == 5 * 2 + 2
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
    weights = [tensor.values for tensor in onnxfile.constants(typed) if tensor.values.dtype.kind == "f"]
    assert all(values.dtype == HALF for values in weights if values.ndim > 1 and values.shape[0] > 1)


def test_weights_are_rounded_when_they_are_saved(plain: gs.Graph, small_dit: DiT, tmp_path: Path) -> None:
    denoiser = fuse_dit(plain, small_dit.spec).denoiser
    wide = {f"{t.name}_{TYPES['fp16']}": t.values for t in onnxfile.constants(denoiser)}
    cast_to_half(denoiser, "fp16")
    waiting = {t.name: t for t in onnxfile.constants(denoiser) if isinstance(t._values, Rounded)}
    assert waiting and waiting.keys() <= wide.keys()
    assert all(t.dtype == HALF and t._values.nbytes == wide[name].nbytes / 2 for name, t in waiting.items())
    onnxfile.save(denoiser, tmp_path / "denoiser.onnx")
    saved = {t.name: t.values for t in onnxfile.constants(onnxfile.load(tmp_path / "denoiser.onnx"))}
    for name in waiting:
        assert np.array_equal(saved[name], wide[name].astype(HALF)), name
    assert not any(isinstance(t._values, Rounded) for t in onnxfile.constants(denoiser))


def test_the_graph_checks_and_stays_near(typed: gs.Graph, plain_path, small_dit: DiT, run: Run, inputs: dict) -> None:
    (expected, _) = run(fuse_dit(onnxfile.load(plain_path), small_dit.spec).denoiser, inputs)
    (got, _) = run(typed, inputs)  # full_check: ONNX's own type inference agrees with ours
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert 1e-6 < error < 5e-3  # eleven bits in two blocks; measured 5e-4


def test_the_twin_rounds_what_the_typed_graph_holds(typed: gs.Graph, run: Run, inputs: dict) -> None:
    casts = onnxfile.census(typed)["Cast"]
    (near, _) = run(typed, inputs)
    rounded = twin(typed, HALF)
    assert rounded > 5 * 2 + 2 and onnxfile.census(typed)["Cast"] > 2 * casts
    assert not [tensor.name for tensor in onnxfile.constants(typed) if tensor.values.dtype == HALF]
    (got, _) = run(typed, inputs)
    assert np.linalg.norm(got - near) / np.linalg.norm(near) < 5e-3


@pytest.mark.parametrize(
    ("backend", "precision", "forms", "expected"),
    [
        ("onnxruntime", "fp16", ("onnxruntime", "onnxruntime-cuda"), "decoder.onnxruntime.onnx"),
        ("onnxruntime", "bf16", ("onnxruntime", "onnxruntime-cuda"), "decoder.onnxruntime-cuda.onnx"),
        ("onnxruntime", "bf16", (), "decoder.onnx"),
        ("tensorrt", "bf16", (), "decoder.onnx"),
    ],
)
def test_the_form_that_computes_in_half_has_the_twin(backend, precision, forms, expected) -> None:
    """A CPU's provider refuses bf16, so that only CUDA's opens it."""
    engines = {form: (f"decoder.{form}.onnx", "decoder.onnx.data") for form in forms}
    engines |= {"tensorrt": ("decoder.engine",)}
    assert half_form(Stage("decoder", "end", (), (), "decoder.onnx", 8, precision, backend, engines)) == expected


def test_an_overflow_shows_in_the_twin_alone(run: Run) -> None:
    """300 x 300 is beyond fp16: a CPU's fp16 product hides it, the twin does not."""
    x = gs.Variable("x", dtype=np.float32, shape=["n", 4])
    y = gs.Variable("y", dtype=np.float32, shape=["n", 4])
    z = gs.Variable("z", dtype=np.float32, shape=["n", 4])
    product = gs.Node("MatMul", "product", {}, [x, gs.Constant("w", np.eye(4, dtype=np.float32) * 300)], [y])
    scaled = gs.Node("Mul", "scaled", {}, [y, gs.Constant("s", np.array(1e-3, np.float32))], [z])
    graph = gs.Graph([product, scaled], [x], [z], opset=23, ir_version=10)
    inputs = {"x": np.full((1, 4), 300, np.float32)}
    assert cast_to_half(graph, "fp16") == 1
    assert graph.nodes[-1].inputs[0].inputs[0].attrs["to"] == onnx.TensorProto.FLOAT
    twin(graph, HALF)
    assert np.isinf(run(graph, inputs)[0]).all()
    assert np.isfinite(run(graph, {"x": inputs["x"] / 2})[0]).all()


def test_an_output_that_a_product_makes_stays_fp32(run: Run) -> None:
    """As the pooled prompt of a projection; a reader inside the graph takes the narrow tensor."""
    names = ("x", "y", "z")
    x, y, z = (gs.Variable(name, dtype=np.float32, shape=["n", 4]) for name in names)
    weight = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    nodes = [
        gs.Node("MatMul", "first", {}, [x, gs.Constant("w", weight)], [y]),
        gs.Node("MatMul", "second", {}, [y, gs.Constant("v", weight.T)], [z]),
    ]
    graph, value = gs.Graph(nodes, [x], [y, z], opset=23, ir_version=10), np.ones((2, 4), np.float32)
    assert cast_to_half(graph, "fp16") == 2
    assert [output.name for output in graph.outputs] == ["y", "z"]
    assert onnxfile.census(graph)["Cast"] == 3  # of x, and of both outputs
    for output, expected in zip(run(graph, {"x": value}), (value @ weight, value @ weight @ weight.T), strict=True):
        assert output.dtype == np.float32
        assert 0 < np.abs(output - expected).max() < 2e-2


@pytest.mark.parametrize(
    ("precision", "kind", "low", "high"), [("bf16", None, 1e-3, 3e-2), ("fp16", "fp8", 5e-3, 1e-1)]
)
def test_other_types_in_the_twin(
    plain_path, small_dit: DiT, run: Run, inputs: dict, precision, kind, low, high
) -> None:
    """bf16 has eight bits, fp8 four: off by as much, and by no more."""
    denoiser = fuse_dit(onnxfile.load(plain_path), small_dit.spec).denoiser
    (expected, _) = run(denoiser.copy(), inputs)
    if kind:
        assert quantize(denoiser, chosen(denoiser), kind=kind) == 8
    assert cast_to_half(denoiser, precision) == 12
    dtype = tensor_dtype_to_np_dtype(TYPES[precision])
    assert {node.inputs[0].dtype for node in denoiser.nodes if node.op == "Attention"} == {dtype}
    twin(denoiser, dtype)
    (got, _) = run(denoiser, inputs)
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert low < error < high


def chosen(denoiser: gs.Graph) -> dict[str, Chosen]:
    return {one.name: Chosen(0.0, np.ones(1, np.float32), 6 / 127, 0.0, 6.0) for one in find(denoiser)}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_q_reads_what_there_is_and_dq_gives_the_product_its_type(plain: gs.Graph, small_dit: DiT, kind) -> None:
    denoiser = fuse_dit(plain, small_dit.spec).denoiser
    quantize(denoiser, chosen(denoiser), kind=kind)
    cast_to_half(denoiser, "fp16")
    read = {node.name: node.inputs[1].dtype for node in denoiser.nodes if node.op == "QuantizeLinear"}
    assert {".".join(name.split()[0].split(".")[2:]): dtype.name for name, dtype in read.items()} == {
        "attn.qkv": "float32",  # behind a LayerNorm's modulation, an island
        "mlp.fc1": "float32",
        "attn.proj": "float16",
        "mlp.fc2": "float16",
    }
    scales = {node.inputs[1].dtype for node in denoiser.nodes if node.op == "DequantizeLinear"}
    assert scales == {HALF}


def test_what_touches_a_wide_tensor_stays_fp32(typed: gs.Graph, plain_path, small_dit: DiT, run: Run, inputs) -> None:
    denoiser = fuse_dit(onnxfile.load(plain_path), small_dit.spec).denoiser
    gelu = next(node for node in denoiser.nodes if node.op == "Gelu")
    wide = [gelu.outputs[0].name]
    (fc2,) = fp32_products(denoiser, wide)
    (expected, _) = run(denoiser.copy(), inputs)
    assert cast_to_half(denoiser, "fp16", wide) == 12 - 1
    assert fc2.inputs[1].dtype == np.float32 and gelu.outputs[0].dtype == np.float32
    twin(denoiser, HALF)
    (got, _) = run(denoiser, inputs)
    assert 1e-6 < np.linalg.norm(got - expected) / np.linalg.norm(expected) < 5e-3


def test_everything_that_would_be_narrow_is_half_tensors(plain: gs.Graph, small_dit: DiT) -> None:
    denoiser = fuse_dit(plain, small_dit.spec).denoiser
    halves = {tensor.name for tensor in half_tensors(denoiser)}
    for node in denoiser.nodes:
        if node.op in PRODUCTS:
            tensors = (*node.inputs, *node.outputs)
            assert {tensor.name for tensor in tensors if isinstance(tensor, gs.Variable) and tensor.name} <= halves
    assert all(node.outputs[0].name not in halves for node in denoiser.nodes if node.op == "LayerNormalization")


def test_scores_are_scaled_before_they_are_stored(run: Run, tmp_path: Path) -> None:
    """q kᵀ = 102400 is beyond fp16 and q kᵀ / √64 is not: the form that ships stays finite, by its twin."""
    q, k, v, y, z = (gs.Variable(name, dtype=np.float32, shape=["n", 2, 5, 64]) for name in "qkvyz")
    nodes = [gs.Node("Attention", "y", {}, [q, k, v], [y]), gs.Node("Tanh", "z", {}, [y], [z])]
    graph = gs.Graph(nodes, [q, k, v], [z], opset=23, ir_version=10)
    inputs = dict(zip("qkv", np.random.default_rng(0).normal(size=(3, 2, 2, 5, 64)).astype(np.float32), strict=True))
    inputs["q"][..., 0] = inputs["k"][:, :, 0, 0] = 320  # so the first token is all that is seen
    assert cast_to_half(graph, "fp16") == plain_attention(graph) == 1
    onnxfile.save(graph, tmp_path / "form.onnx")
    shipped = onnxfile.load(tmp_path / "form.onnx")
    assert twin(shipped, HALF) == 9  # q, k, v, the scale, the turned k, the scaled q, scores, weights, y
    (got,) = run(shipped, inputs)
    np.testing.assert_allclose(got, np.broadcast_to(np.tanh(inputs["v"][:, :, :1]), got.shape), rtol=0, atol=2e-3)


def test_scores_that_overflow_keep_their_attention_in_fp32(plain: gs.Graph, small_dit: DiT) -> None:
    denoiser = fuse_dit(plain, small_dit.spec).denoiser
    first = next(node for node in denoiser.nodes if node.op == "Attention")
    assert fp32_products(denoiser, [scores_of(first.outputs[0])]) == [first]
    cast_to_half(denoiser, "fp16", [scores_of(first.outputs[0])])
    assert [node.inputs[0].dtype for node in denoiser.nodes if node.op == "Attention"] == [np.float32, np.float16]
