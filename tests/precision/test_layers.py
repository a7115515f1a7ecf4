"""Tests of which products are token GEMMs.

They also check what is measured of inputs of any rank and of graph inputs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from dit_export.graph import onnxfile, trace
from dit_export.precision.calibrate import LARGEST, SAMPLE, Calibration, LayerStatistics, add_layer_taps
from dit_export.precision.layers import find
from dit_export.precision.qdq import quantize
from dit_export.precision.smooth import smooth

CHANNELS, HIDDEN = 8, 16


def mlp(shape: tuple[int, ...], bias: bool = True) -> gs.Graph:
    """Return fc1, GELU and fc2 on a graph input; without a bias, a variable is added to what fc1 gives."""
    rng, rows = np.random.default_rng(0), ["rows", *shape]
    x = gs.Variable("x", np.float32, [*rows, CHANNELS])
    other = gs.Variable("other", np.float32, [*rows, HIDDEN])
    graph = gs.Graph(inputs=[x] if bias else [x, other], opset=trace.OPSET, ir_version=10)

    def weight(*sizes: int) -> np.ndarray:
        return rng.normal(size=sizes).astype(np.float32)

    product = onnxfile.layer(graph, "MatMul", [x, weight(CHANNELS, HIDDEN)], "product")
    hidden = onnxfile.layer(graph, "Add", [product, weight(HIDDEN) if bias else other], "hidden")
    active = onnxfile.layer(graph, "Gelu", [hidden], "active")
    product = onnxfile.layer(graph, "MatMul", [active, weight(HIDDEN, CHANNELS)], "second")
    result = onnxfile.layer(graph, "Add", [product, weight(CHANNELS)], "result")
    for tensor, width in ((active, HIDDEN), (hidden, HIDDEN), (result, CHANNELS)):
        tensor.dtype, tensor.shape = np.dtype(np.float32), [*rows, width]
    graph.outputs = [result]
    return graph


def test_only_a_constant_is_a_bias() -> None:
    assert [layer.kind for layer in find(mlp((6,)))] == ["fc1", "fc2"]
    assert [layer.kind for layer in find(mlp((6,), bias=False))] == ["fc2"]


@pytest.mark.parametrize("shape", [(6,), (4, 5)], ids=str)
def test_taps_of_any_rank(shape: tuple[int, ...], tmp_path: Path) -> None:
    graph = mlp(shape)
    add_layer_taps(graph, find(graph), np.random.default_rng(0))
    onnxfile.save(graph, tmp_path / "x.onnx")
    session = ort.InferenceSession(tmp_path / "x.onnx")
    x = np.random.default_rng(1).normal(size=(3, *shape, CHANNELS)).astype(np.float32)
    outputs = dict(zip([output.name for output in session.get_outputs()], session.run(None, {"x": x}), strict=True))
    np.testing.assert_array_equal(outputs[f"block 0 fc1{LARGEST}"], np.abs(x).reshape(-1, CHANNELS).max(axis=0))
    assert outputs[f"block 0 fc1{SAMPLE}"].shape == (3, *shape, CHANNELS)  # no axis has more than TOKENS
    assert outputs[f"block 0 fc2{LARGEST}"].shape == (HIDDEN,)


def test_what_reads_a_graph_input_is_not_smoothed() -> None:
    graph, rng = mlp((6,)), np.random.default_rng(2)
    sizes = {layer.name: len(layer.weight.values) for layer in find(graph)}
    samples = {name: rng.normal(size=(32, size)).astype(np.float32) for name, size in sizes.items()}
    seen = {name: LayerStatistics(np.abs(rows).max(axis=0), rows) for name, rows in samples.items()}
    chosen = smooth([], graph, Calibration(seen, {}))
    assert [choice.alpha for choice in chosen.values()] == [0, 0]
    assert quantize(graph, chosen) == 2
