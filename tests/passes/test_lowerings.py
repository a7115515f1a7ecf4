"""Passes of single backends, and the decoder's sub-pixel convolution: count, census, numerics, near misses."""

import platform
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import TensorProto

from dit_export.graph import onnxfile
from dit_export.networks.dit import DiT
from dit_export.networks.spec import expected_counts
from dit_export.passes import LOWERINGS
from dit_export.passes.attention import masked_attention, plain_attention
from dit_export.passes.depth_to_space import depth_to_space
from dit_export.passes.group_norm import group_norm
from dit_export.passes.integer_products import integer_products
from dit_export.passes.qkv import split_qkv
from dit_export.passes.subpixel import subpixel
from dit_export.precision.half import cast_to_half
from tests.passes.conftest import Run, fuse_dit
from tests.passes.test_hoist import empty, layer

RNG = np.random.default_rng(0)
UP = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
CONV = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


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


def projected(parts: int = 3, bias: np.ndarray | None = None, axis: int = -1) -> gs.Graph:
    graph = empty(x=["n", 5, 8])
    product = layer(graph, "MatMul", [graph.inputs[0], normal(8, 12)], ["n", 5, 12])
    whole = layer(graph, "Add", [product, normal(12) if bias is None else bias], ["n", 5, 12])
    graph.outputs = [gs.Variable(f"part{i}", dtype=np.float32, shape=["n", 5, 12 // parts]) for i in range(parts)]
    graph.nodes.append(gs.Node("Split", "split", {"axis": axis, "num_outputs": parts}, [whole], list(graph.outputs)))
    return graph


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


def test_every_form_of_a_denoiser_is_the_same_function(plain: gs.Graph, small_dit: DiT, run: Run) -> None:
    denoiser = fuse_dit(plain, small_dit.spec).denoiser
    inputs = {
        "latents": normal(2, 4, 8, 8),
        "conditioning": normal(2, 2, small_dit.spec.num_vectors, small_dit.spec.hidden),
        "guidance": np.array([1, 4], np.float32),
    }
    expected = run(denoiser.copy(), inputs)
    for backend, passes in LOWERINGS.items():
        form = denoiser.copy()
        counts = {rewrite.__name__: rewrite(form) for rewrite in passes}
        assert counts.items() <= expected_counts(small_dit.spec).items(), backend
        for got, want in zip(run(form, inputs), expected, strict=True):
            assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max(), backend  # as the fused pair's tolerance


@pytest.mark.parametrize("place", ["absolute", "relative", "link"])
def test_forms_share_their_weights(plain: gs.Graph, small_dit: DiT, tmp_path, monkeypatch, place: str) -> None:
    if place == "relative":
        monkeypatch.chdir(tmp_path)
        tmp_path = Path()
    elif place == "link":
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        tmp_path = tmp_path / "link"
    denoiser = fuse_dit(plain, small_dit.spec).denoiser
    assert onnxfile.save(denoiser, tmp_path / "a.onnx") == ("a.onnx", "a.onnx.data")
    form = denoiser.copy()
    plain_attention(form)
    assert onnxfile.save(form, tmp_path / "b.onnx") == ("b.onnx", "a.onnx.data")
    changed = denoiser.copy()
    weight = next(tensor for tensor in onnxfile.constants(changed) if tensor.values.nbytes > 10_000)
    weight.values = weight.values * 2
    first, *rest = onnxfile.save(changed, tmp_path / "c.onnx")
    assert first == "c.onnx" and sorted(rest) == ["a.onnx.data", "c.onnx.data"]
    again = {tensor.name: tensor.values for tensor in onnxfile.constants(onnxfile.load(tmp_path / "c.onnx"))}
    np.testing.assert_array_equal(again[weight.name], weight.values)
