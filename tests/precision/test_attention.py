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
from dit_runtime import backends
from dit_runtime.backends import Options
from dit_runtime.errors import UsageError
from tests.precision.conftest import SPEC


def prediction(graph: gs.Graph, folder: Path, name: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    inputs = {
        "latents": rng.normal(size=(2, 4, 8, 8)).astype(np.float32),
        "conditioning": rng.normal(size=(1, 2, SPEC.num_vectors, SPEC.hidden)).astype(np.float32),
        "guidance": np.ones(2, np.float32),
    }
    files = onnxfile.save(graph, folder / f"{name}.onnx")
    engine = backends.backend("openvino").open(
        [folder / file for file in files], Options(threads=1)
    )  # computes in fp32
    return engine.run(inputs)["prediction"]


def test_scores_on_their_grids(bundle, calibration, tmp_path) -> None:
    graph = onnxfile.load(bundle / "denoiser.onnx")
    before, expected = onnxfile.census(graph), prediction(graph.copy(), tmp_path, "float")
    kept = named(find(graph), ["block 1 attention"])
    grids = attention.steps(graph, calibration, kept)
    rewrite, *others = attention.passes("openvino", grids)
    assert tuple(others) == LOWERINGS["openvino"]
    assert rewrite(graph) == 2
    after = onnxfile.census(graph)
    assert (after["QuantizeLinear"], after["DequantizeLinear"], after["Attention"], after["Softmax"]) == (4, 4, 1, 2)
    assert after["MatMul"] == before["MatMul"] + 4
    got = prediction(graph, tmp_path, "int8")
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.02, error  # a step is 1/127 of the largest, 4 deviations out: 1 % of a score, and two blocks

    # Teeth: a grid that ends at an eighth of what was seen.
    coarse = {name: [step / 8 for step in pair] for name, pair in grids.items()}
    graph = onnxfile.load(bundle / "denoiser.onnx")
    assert attention.passes("openvino", coarse)[0](graph) == 2
    cut = prediction(graph, tmp_path, "cut")
    assert np.linalg.norm(cut - expected) > 5 * np.linalg.norm(got - expected)


def test_only_where_it_gains(bundle, calibration) -> None:
    graph = onnxfile.load(bundle / "denoiser.onnx")
    grids = attention.steps(graph, calibration, [])
    assert len(grids) == SPEC.depth
    assert attention.passes("onnxruntime", grids) == LOWERINGS["onnxruntime"]
    assert attention.steps(graph, calibration, everything(find(graph))) == {}
    masked = next(node for node in graph.nodes if node.op == "Attention")
    masked.attrs["is_causal"] = 1
    assert attention.passes("openvino", grids)[0](graph) == SPEC.depth - 1


def test_a_calibration_that_did_not_look_there(bundle, calibration) -> None:
    blind = {name: replace(seen, output=None) for name, seen in calibration.layers.items()}
    with pytest.raises(UsageError, match="calibrate anew"):
        attention.steps(onnxfile.load(bundle / "denoiser.onnx"), Calibration(blind, {}), [])
