"""Taps cost no memory: each runs as soon as its tensor is there, so a network's activations are not kept for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from dit_export.graph import onnxfile
from dit_export.precision import calibrate, peaks


def tap_layers(graph: gs.Graph) -> None:
    calibrate.add_taps(graph, 16, np.random.default_rng(0))


@pytest.mark.parametrize("tap", [peaks.tap, tap_layers], ids=["peaks", "calibration"])
def test_no_tensor_waits_for_its_tap(bundle, tap: Callable[[gs.Graph], object], tmp_path) -> None:
    graph = onnxfile.load(bundle / "denoiser.onnx")
    network = {id(node) for node in graph.nodes}
    tap(graph)
    added = [node for node in graph.nodes if id(node) not in network]
    onnxfile.save(graph, tmp_path / "tapped.onnx")
    order = {name: place for place, name in enumerate(executed(tmp_path / "tapped.onnx"))}
    waits = [order[node.name] - order[node.i().name] for node in added if node.inputs[0].inputs]
    assert len(waits) > 24
    assert max(waits) <= 8  # a tensor has up to three taps of two nodes; a late one waits for half the network


def executed(path: Path) -> list[str]:
    """The nodes' names, in the order in which ONNX Runtime ran them."""
    settings = ort.SessionOptions()
    settings.enable_profiling, settings.profile_file_prefix = True, str(path)
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # fusions have names of their own
    session = ort.InferenceSession(path, settings)
    sizes, rng = {"batch": 1, "groups": 2}, np.random.default_rng(0)
    shapes = {tensor.name: [sizes.get(size, size) for size in tensor.shape] for tensor in session.get_inputs()}
    session.run(None, {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})
    events = json.loads(Path(session.end_profiling()).read_text())
    return [event["name"].removesuffix("_kernel_time") for event in events if event.get("cat") == "Node"]
