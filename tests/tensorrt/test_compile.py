"""TensorRT-RTX compiles for real, on a machine with no GPU: every precision, the gate, and what is refused at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx.helper import np_dtype_to_tensor_dtype

from dit_export.graph import onnxfile
from dit_export.graph.onnxfile import layer
from dit_export.networks.spec import MODELS, ModelSpec
from dit_export.precision.half import cast_to_half, fp32_products
from dit_export.precision.layers import find
from dit_export.precision.qdq import quantize
from dit_export.precision.smooth import Chosen
from dit_runtime.backends import Options, Tuning, backend, trt_preflight, typed
from dit_runtime.backends import trt as trt_backend
from dit_runtime.backends.trt_network import profiles
from dit_runtime.bundle.manifest import Stage, TensorSpec
from dit_runtime.errors import BundleError, GateError, UsageError
from dit_runtime.progress import Progress
from tests.tensorrt.graphs import dit, fuse_network, save, traced

RTX = backend("tensorrt-rtx")
SMALL = ModelSpec(depth=1, hidden=64, heads=2, patch=2, latent_size=8, num_classes=10)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return traced(dit(SMALL), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def s2(tmp_path_factory) -> Path:
    return traced(dit(MODELS["S/2"]), tmp_path_factory.mktemp("s2"))


def denoiser(path: Path, spec: ModelSpec, precision: str, overflows: tuple[str, ...] = ()) -> gs.Graph:
    """Fused and typed, its activations' grids made up."""
    graph = fuse_network(path, dit(spec)).denoiser
    if precision in ("int8", "fp8"):
        chosen = {one.name: Chosen(0.0, np.ones(1, np.float32), 4 / 127, 0.0, 4.0) for one in find(graph)}
        quantize(graph, chosen, kind=precision)
    if inner := typed("tensorrt-rtx", precision):
        cast_to_half(graph, inner, overflows)
    return graph


def compile_(stage: Stage, folder: Path, **options) -> trt_backend.Compiled:
    return RTX.compile(folder, stage, Options(precision=stage.precision, **options), Progress())


@pytest.mark.parametrize(
    ("precision", "products"),
    [
        ("fp16", {"fp16": 62}),
        ("bf16", {"bf16": 62}),
        ("int8", {"int8": 48, "fp16": 14}),  # patches, attention and the last linear stay fp16
        ("fp8", {"fp8": 48, "fp16": 14}),
    ],
)
def test_every_precision(s2, tmp_path, precision, products) -> None:
    graph = save(denoiser(s2, MODELS["S/2"], precision), tmp_path, precision)
    made, built = compile_(graph, tmp_path)
    assert made == ("denoiser.tensorrt-rtx.engine",)
    weights = 2 if precision in ("fp16", "bf16") else 1  # bytes
    assert (tmp_path / made[0]).stat().st_size > 21e6 * weights  # its 21M weights are in it
    assert built["census"] == {"of": "network", "products": products, "islands": []}
    assert built["version"] == RTX.version() and built["cuda"] == 13
    least = {"fp8": "8.9"}.get(precision, "8.0")
    assert built["compute_capabilities"][0] == least and "7.5" not in built["compute_capabilities"]


def test_turing_has_no_fp32_products(small, tmp_path) -> None:
    """The conditioner and the update of every bundle multiply in fp32: TensorRT-RTX names 7.5, and we do not."""
    (conditioner,) = fuse_network(small, dit(SMALL)).stages
    stage = save(conditioner.graph, tmp_path, "fp32", conditioner.name, conditioner.runs)
    with pytest.raises(BundleError, match="FP32 GEMM is not supported"):
        replace(RTX, capabilities=("7.5",)).compile(tmp_path, stage, Options(), Progress())


def test_a_planted_fp32_product_is_refused(small, tmp_path) -> None:
    graph = denoiser(small, SMALL, "fp16")
    where = next(node for node in graph.nodes if node.op == "LayerNormalization")
    (x,) = where.outputs
    readers = list(x.outputs)
    planted = layer(graph, "MatMul", [x, np.eye(64, dtype=np.float32)], "planted")
    for reader in readers:
        reader.inputs[reader.inputs.index(x)] = planted
    graph.toposort()
    contract = save(graph, tmp_path, "fp16")
    with pytest.raises(GateError, match="1 of 8 products are not in fp16 and no listed island: 'planted' is fp32"):
        compile_(contract, tmp_path)
    assert not [*tmp_path.glob("*.engine")]
    assert compile_(contract, tmp_path, islands=("planted",)).built["census"]["products"] == {"fp16": 7, "fp32": 1}


@pytest.mark.parametrize(
    ("precision", "asked"), [("fp16", "bf16"), ("fp32", "fp16"), ("fp16", "int8"), ("int8", "fp8")]
)
def test_a_graph_of_another_precision_is_refused(small, tmp_path, precision, asked) -> None:
    with pytest.raises(GateError, match=asked):
        compile_(save(denoiser(small, SMALL, precision), tmp_path, asked), tmp_path)


def test_what_is_kept_wide_is_an_island(small, tmp_path) -> None:
    plain = denoiser(small, SMALL, "fp32")
    attention = next(node for node in plain.nodes if node.op == "Attention")
    wide = (attention.inputs[0].name, attention.outputs[0].name)
    (island,) = (node.name for node in fp32_products(plain, wide))
    contract = save(denoiser(small, SMALL, "fp16", wide), tmp_path, "fp16")
    with pytest.raises(GateError, match="1 of 7 products are not in fp16"):
        compile_(contract, tmp_path)
    census = compile_(contract, tmp_path, islands=(island,)).built["census"]
    assert census == {"of": "network", "products": {"fp16": 6, "fp32": 1}, "islands": [island]}


@pytest.mark.parametrize(("precision", "width"), [("fp32", 72), ("fp16", 512)])
def test_attention_without_a_kernel_is_decomposed(tmp_path, monkeypatch, precision, width) -> None:
    """TensorRT refuses it unless it is told to: fp32, and the 512 channels of a VAE decoder's only head."""
    dtype = np.dtype(np.float32 if precision == "fp32" else np.float16)
    graph = gs.Graph(opset=23, ir_version=10)
    x = gs.Variable("x", dtype=np.float32, shape=["batch", 1, 64, width])
    graph.inputs = [x]
    inside = layer(graph, "Cast", [x], "inside", to=np_dtype_to_tensor_dtype(dtype))
    q, k, v = (layer(graph, "Mul", [inside, np.array(part, dtype)], f"part{part}") for part in (1, 2, 3))
    product = layer(graph, "Attention", [q, k, v], "attention")
    y = gs.Variable("y", dtype=np.float32, shape=["batch", 1, 64, width])
    layer(graph, "Cast", [product], y, to=np_dtype_to_tensor_dtype(np.dtype(np.float32)))
    graph.outputs = [y]
    onnxfile.save(graph, tmp_path / "graph.onnx")
    (tmp_path / "graph.onnx.data").touch()
    spec = TensorSpec("x", "float32", ("batch", 1, 64, width))
    specs = (spec,), (replace(spec, name="y"),)
    contract = Stage("graph", "step", *specs, "graph.onnx", max_batch=2, precision=precision)
    assert compile_(contract, tmp_path).built["census"]["products"] == {precision: 1}
    monkeypatch.setattr(trt_backend, "decompose_attention", lambda *_: None)
    with pytest.raises(BundleError, match="Attention operation was not supported by a dedicated kernel"):
        compile_(contract, tmp_path)


def test_profiles_come_from_the_signature() -> None:
    latents = TensorSpec("latents", "float32", ("batch", 4, 8, 8))
    vectors = TensorSpec("conditioning", "float32", ("groups", "batch", 8, 64))
    weights, labels = TensorSpec("guidance", "float32", ("batch",)), TensorSpec("labels", "int64", ("rows",))
    step = Stage("denoiser", "step", (latents, vectors, weights), (latents,), "denoiser.onnx", max_batch=8)
    without, guided = profiles(step)
    assert without["conditioning"] == ((1, 1, 8, 64), (1, 2, 8, 64), (1, 8, 8, 64))
    assert guided["conditioning"] == ((2, 1, 8, 64), (2, 2, 8, 64), (2, 8, 8, 64))
    assert guided["guidance"] == ((1,), (2,), (8,))
    (alone,) = profiles(replace(step, reads=(latents, vectors)))  # a network that mixes no guidance has one group
    assert alone["conditioning"] == without["conditioning"]
    (only,) = profiles(Stage("conditioner", "condition", (labels,), (labels,), "conditioner.onnx", max_batch=64))
    assert only["labels"] == ((1,), (16,), (64,))


@pytest.mark.parametrize(
    ("name", "precision", "tuning", "reason"),
    [
        (
            "tensorrt-rtx",
            "fp8",
            {"compute_capability": ("8.9", "8.6")},
            "capability 8.6 has no fp8; it needs 8.9",
        ),
        ("tensorrt-rtx", "fp16", {"compute_capability": ("7.5",)}, "for compute capability 8.0, .* and not for '7.5'"),
        ("tensorrt-rtx", "fp16", {"compute_capability": ("9.0",)}, "for compute capability 8.0, .* and not for '9.0'"),
        (
            "tensorrt-rtx",
            "fp16",
            {"timing_cache": "x"},
            "tensorrt-rtx has no --timing-cache; it has --compute",
        ),
        (
            "tensorrt-rtx",
            "fp16",
            {"hardware_compatibility_level": "turing"},
            "'turing' is not known; known: none",
        ),
        ("tensorrt", "fp16", {"compute_capability": ("8.9",)}, "tensorrt has no --compute-capability"),
        ("tensorrt", "fp16", {"strip_plan": True}, "compiles on its target alone, and not here"),
    ],
)
def test_refused_at_once(name, precision, tuning, reason) -> None:
    with pytest.raises(UsageError, match=reason):
        backend(name).targets(precision, Tuning(**tuning))


@pytest.mark.parametrize("pool", ["workspace", "workspace:4Q", "kitchen:4G", "workspace:-1G", "workspace:4.5G"])
def test_pools_that_are_none(small, tmp_path, pool) -> None:
    graph = save(denoiser(small, SMALL, "fp16"), tmp_path, "fp16")
    with pytest.raises(UsageError, match=f"pool-limit '{pool}'; expected"):
        compile_(graph, tmp_path, tuning=Tuning(pool_limit=(pool,)))


def test_its_own_words_are_passed_on(small, tmp_path) -> None:
    graph = save(denoiser(small, SMALL, "fp16"), tmp_path, "fp16")
    tuning = Tuning(
        compute_capability=("8.9",), builder_optimization_level=1, pool_limit=("workspace:256M",), weight_streaming=True
    )
    built = compile_(graph, tmp_path, tuning=tuning).built
    assert built["compute_capabilities"] == ["8.9"]
    assert built["tuning"]["weight_streaming"] is True and built["tuning"]["pool_limit"] == ("workspace:256M",)


@pytest.mark.parametrize(("what", "name"), [("memory", "MEMORY_FACTOR"), ("disk", "DISK_FACTOR")])
def test_too_little_room_is_seen_before_the_work(small, tmp_path, monkeypatch, what, name) -> None:
    graph = save(denoiser(small, SMALL, "fp16"), tmp_path, "fp16")
    monkeypatch.setattr(trt_preflight, name, 1e9)
    with pytest.raises(UsageError, match=f"GB of {what} free, expected .* to compile this graph"):
        compile_(graph, tmp_path)


def test_what_is_no_graph(tmp_path) -> None:
    (tmp_path / "denoiser.onnx").write_bytes(b"\x00\x01 no graph")
    (tmp_path / "denoiser.onnx.data").write_bytes(b"")
    graph = Stage("denoiser", "step", (), (), "denoiser.onnx", precision="fp16")
    with pytest.raises(BundleError, match=r"denoiser\.onnx: tensorrt-rtx does not take it: "):
        compile_(graph, tmp_path)
