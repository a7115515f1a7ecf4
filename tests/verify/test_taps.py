"""Residual sums are found by structure, in every form a denoiser may have, and nothing else is taken for one."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic

from dit_export.graph import onnxfile
from dit_export.graph.onnxfile import layer
from dit_export.precision.half import cast_to_half
from dit_export.verify.localize import _places
from dit_export.verify.taps import original, residual_sums
from dit_export.verify.traced import Traced
from tests.conftest import HIDDEN, META_DEPTH


@pytest.fixture(params=["portable", "onnxruntime", "openvino", "fp16", "dynamic int8"])
def denoiser(request, meta, tmp_path) -> gs.Graph:
    name = f"denoiser.{request.param}.onnx" if request.param in ("onnxruntime", "openvino") else "denoiser.onnx"
    if request.param == "dynamic int8":
        model = onnx.load(meta.bundle / name)
        quantize_dynamic(model, tmp_path / "int8.onnx", weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
        graph = onnxfile.load(tmp_path / "int8.onnx")
        assert onnxfile.census(graph)["MatMulInteger"] >= 4 * META_DEPTH
        return graph
    graph = onnxfile.load(meta.bundle / name)
    if request.param == "fp16":
        cast_to_half(graph, "fp16")
    return graph


def test_two_sums_a_block(denoiser):
    """The stream runs through all of them: each sum is the next one's x; the final modulation reads the last."""
    sums = residual_sums(denoiser)
    assert len(sums) == 2 * META_DEPTH
    for (_, before), (x, _) in itertools.pairwise(sums):
        assert original(x) is before
    last = sums[-1][1]
    assert [node.op for node in last.outputs] == ["LayerNormalization"]


def build(branch: str) -> gs.Graph:
    """x + something that is no branch of x, and one that is."""
    x = gs.Variable("x", np.float32, ["n", 4, HIDDEN])
    y = gs.Variable("y", np.float32, ["n", 4, HIDDEN])
    out = gs.Variable("out", np.float32, ["n", 4, HIDDEN])
    graph = gs.Graph(inputs=[x, y], outputs=[out], opset=20)
    op, factor = ("Mul", np.float32([3])) if branch == "twice" else ("MatMul", np.zeros((HIDDEN, HIDDEN), np.float32))
    product = layer(graph, op, [y if branch == "other" else x, factor], "product")
    first = layer(graph, "Tile", [x, np.array([2, 1, 1])], "copy") if branch == "copied" else x
    layer(graph, "Add", [first, layer(graph, "Mul", [product, np.float32([2])], "gated")], out)
    return graph


@pytest.mark.parametrize(("branch", "count"), [("residual", 1), ("copied", 1), ("other", 0), ("twice", 0)])
def test_what_is_a_residual_sum(branch, count):
    """Not a sum of two inputs' ways, and not x + a · x, as modulation and guidance are."""
    assert len(residual_sums(build(branch))) == count


def test_names_of_places():
    places = _places(["add", "add_1", "add_2"], Traced((), {"add_2": "blocks.0.mlp"}))
    assert [*places] == ["add", "add_1", "add_2"]
    assert [*places.values()] == [
        "before the first residual sum",
        "residual sum 1 of 2 (add_1)",
        "blocks.0.mlp (residual sum 2 of 2)",
    ]
