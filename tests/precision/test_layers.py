"""Tests of which products are layers, of their names, and of what is measured of inputs of any rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from dit_export.graph import onnxfile, trace
from dit_export.precision.calibrate import LARGEST, SAMPLE, Calibration, LayerStatistics, add_layer_taps
from dit_export.precision.layers import coverage, find
from dit_export.precision.qdq import quantize
from dit_export.precision.smooth import smooth

CHANNELS, HIDDEN = 8, 16


def mlp(shape: tuple[int, ...], bias: bool = True) -> gs.Graph:
    """Return embed, fc1, GELU, fc2 and head; without a bias, a variable is added to what fc1 gives."""
    rng, rows = np.random.default_rng(0), ["rows", *shape]
    state = gs.Variable("x", np.float32, [*rows, CHANNELS])
    other = gs.Variable("other", np.float32, ["groups", *shape, HIDDEN])  # as stages give it
    graph = gs.Graph(inputs=[state] if bias else [state, other], opset=trace.OPSET, ir_version=10)

    def weight(*sizes: int) -> np.ndarray:
        return rng.normal(size=sizes).astype(np.float32)

    def made(op: str, name: str, width: int, *inputs: gs.Tensor | np.ndarray) -> gs.Variable:
        tensor = onnxfile.layer(graph, op, inputs, name)
        tensor.dtype, tensor.shape = np.dtype(np.float32), [*rows, width]
        return tensor

    def linear(name: str, source: gs.Tensor, wide: int, width: int) -> gs.Variable:
        return made("MatMul", name, width, source, gs.Constant(f"net.{name}.weight", weight(wide, width)))

    x = linear("embed", state, CHANNELS, CHANNELS)
    product = linear("fc1", x, CHANNELS, HIDDEN)
    hidden = made("Add", "hidden", HIDDEN, product, weight(HIDDEN) if bias else other)
    product = linear("fc2", made("Gelu", "active", HIDDEN, hidden), HIDDEN, CHANNELS)
    graph.outputs = [linear("head", made("Add", "second", CHANNELS, product, weight(CHANNELS)), CHANNELS, CHANNELS)]
    return graph


def test_a_bias_is_optional() -> None:
    """The first product of the state and the last of the result are no layers; `net.` begins all names."""
    for bias, outputs in ((True, ["hidden", "second"]), (False, ["fc1", "second"])):
        layers = find(mlp((6,), bias))
        assert [layer.name for layer in layers] == ["fc1", "fc2"]
        assert [layer.y.name for layer in layers] == outputs  # a variable that is added is no bias
    vectors = mlp(())  # (rows, channels): no tokens
    assert find(vectors) == [] and coverage(vectors, []) == 0


@pytest.mark.parametrize("shape", [(6,), (4, 5)], ids=str)
def test_taps_of_any_rank(shape: tuple[int, ...], tmp_path: Path) -> None:
    graph = mlp(shape)
    add_layer_taps(graph, find(graph), np.random.default_rng(0))
    onnxfile.save(graph, tmp_path / "x.onnx")
    session = ort.InferenceSession(tmp_path / "x.onnx")
    x = np.random.default_rng(1).normal(size=(3, *shape, CHANNELS)).astype(np.float32)
    read = x @ graph.nodes[0].inputs[1].values
    outputs = dict(zip([output.name for output in session.get_outputs()], session.run(None, {"x": x}), strict=True))
    np.testing.assert_allclose(outputs[f"fc1{LARGEST}"], np.abs(read).reshape(-1, CHANNELS).max(axis=0))
    assert outputs[f"fc1{SAMPLE}"].shape == (3, *shape, CHANNELS)  # no axis has more than TOKENS
    assert outputs[f"fc2{LARGEST}"].shape == (HIDDEN,)


@pytest.mark.parametrize("shared", [False, True])
def test_what_others_read_too_is_not_smoothed(shared: bool) -> None:
    """The output of embed can be divided in its weight; that of a GELU in nothing."""
    graph, rng = mlp((6,)), np.random.default_rng(2)
    if shared:
        residual = onnxfile.layer(graph, "Neg", [graph.nodes[0].outputs[0]], "residual")
        residual.dtype, residual.shape = np.dtype(np.float32), ["rows", 6, CHANNELS]
        graph.outputs.append(residual)
    sizes = {layer.name: len(layer.matrix) for layer in find(graph)}
    samples = {name: rng.normal(size=(32, size)).astype(np.float32) for name, size in sizes.items()}
    for rows in samples.values():
        rows[:, 3] *= 50
    statistics = {name: LayerStatistics(np.abs(rows).max(axis=0), rows) for name, rows in samples.items()}
    chosen = smooth([], graph, Calibration(statistics, {}))
    assert [choice.alpha > 0 for choice in chosen.values()] == [not shared, False]
    assert quantize(graph, chosen) == 2
