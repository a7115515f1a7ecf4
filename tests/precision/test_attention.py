"""Attention's scores in int8: on grids that calibration has seen, where a backend gains by it, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from dit_export.graph import onnxfile
from dit_export.passes import LOWERINGS
from dit_export.precision import attention
from dit_export.precision.calibrate import Calibration
from dit_export.precision.layers import everything, find, named
from dit_runtime.errors import UsageError
from tests.precision.conftest import SPEC, Scratch


def prediction(bundle: Scratch, denoiser: gs.Graph, folder: Path) -> np.ndarray:
    """Return a graph's prediction for two rows of noise, on a backend that computes in fp32."""
    with bundle.open(bundle.graphs() | {"denoiser": denoiser}, folder, "openvino") as pipe:
        state = np.random.default_rng(3).normal(size=(2, *bundle.network.state.shape)).astype(np.float32)
        inputs = pipe.engines.inputs(np.array([500.0]), bundle.rows(), None, np.ones(2, np.float32))
        return pipe.engines.denoise(state, inputs, 0)[0]


def test_scores_on_their_grids(bundle, calibration, tmp_path) -> None:
    graph = bundle.graphs()["denoiser"]
    before, expected = onnxfile.census(graph), prediction(bundle, graph.copy(), tmp_path)
    in_float = named(find(graph), ["blocks.1.attn.attention"])
    grids = attention.steps(graph, calibration, in_float)
    rewrite, *others = attention.passes("openvino", grids)
    assert tuple(others) == LOWERINGS["openvino"]
    assert rewrite(graph) == 2
    after = onnxfile.census(graph)
    assert (after["QuantizeLinear"], after["DequantizeLinear"], after["Attention"], after["Softmax"]) == (4, 4, 1, 2)
    assert after["MatMul"] == before["MatMul"] + 4
    got = prediction(bundle, graph, tmp_path)
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.02, error  # a step is 1/127 of the largest, 4 deviations out: 1 % of a score, and two blocks

    # Teeth: a grid that ends at an eighth of what was seen.
    coarse = {name: [step / 8 for step in pair] for name, pair in grids.items()}
    graph = bundle.graphs()["denoiser"]
    assert attention.passes("openvino", coarse)[0](graph) == 2
    cut = prediction(bundle, graph, tmp_path)
    assert np.linalg.norm(cut - expected) > 5 * np.linalg.norm(got - expected)


def test_only_where_it_gains(bundle, calibration) -> None:
    graph = bundle.graphs()["denoiser"]
    grids = attention.steps(graph, calibration, [])
    assert len(grids) == SPEC.depth
    assert attention.passes("onnxruntime", grids) == LOWERINGS["onnxruntime"]
    assert attention.steps(graph, calibration, everything(find(graph))) == {}
    masked = next(node for node in graph.nodes if node.op == "Attention")
    masked.attrs["is_causal"] = 1
    assert attention.passes("openvino", grids)[0](graph) == SPEC.depth - 1


def test_q_and_k_of_layers_of_their_own(captioned, captioned_calibration) -> None:
    """A PixArt block's self-attention is on grids, one for q and one for k. Its cross-attention is not."""
    graph = captioned.graphs()["denoiser"]
    attentions = [node for node in graph.nodes if node.op == "Attention"]
    grids = attention.steps(graph, captioned_calibration, [])
    assert [*grids] == [node.outputs[0].name for node in attentions[::2]] and len(attentions) == 4
    for block, pair in enumerate(grids.values()):
        largest = [
            captioned_calibration.layers[f"transformer_blocks.{block}.attn1.{kind}"].output.max()
            for kind in ("to_q", "to_k")
        ]
        np.testing.assert_allclose(pair, np.array(largest) * 1.1 / 127, rtol=1e-6)
    assert attention.passes("openvino", grids)[0](graph) == 2


def test_a_calibration_that_did_not_look_there(bundle, calibration) -> None:
    blind = {name: replace(layer, output=None) for name, layer in calibration.layers.items()}
    with pytest.raises(UsageError, match="calibrate anew"):
        attention.steps(bundle.graphs()["denoiser"], Calibration(blind, {}), [])
