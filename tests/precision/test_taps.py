"""Taps cost no memory: each runs as soon as its tensor is there, so a network's activations are not kept for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from dit_export.graph import onnxfile
from dit_export.precision import measure
from dit_export.precision.half import PEAK
from dit_export.precision.measure import Plan, add_taps


@pytest.mark.parametrize(("layers", "half"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("network", ["bundle", "captioned"])
def test_no_tensor_waits_for_its_tap(request, network, layers, half, tmp_path) -> None:
    graph = request.getfixturevalue(network).graphs()["denoiser"]
    outputs, attentions = len(graph.outputs), onnxfile.census(graph)["Attention"]
    add_taps(graph, layers, half, np.random.default_rng(0))
    scores = [tensor.name for tensor in graph.outputs if tensor.name.endswith("_scores" + PEAK)]
    assert len(scores) == attentions * half
    added, ends = [], [tensor.inputs[0] for tensor in graph.outputs[outputs:]]
    for end in ends:
        added += [end] if end.op == "Gather" else [end.i(), end]
    onnxfile.save(graph, tmp_path / "tapped.onnx")
    order = {name: place for place, name in enumerate(executed(tmp_path / "tapped.onnx"))}
    waits = [order[node.name] - order[node.i().name] for node in added if node.inputs[0].inputs]
    assert len(waits) > 24
    # A DiT's tensor has up to three taps of two nodes, a PixArt's three layers; a late tap waits for half the network.
    assert max(waits) <= (8 if network == "bundle" and layers != half else 12)


def test_no_activation_is_stored(bundle, monkeypatch) -> None:
    """A run leaves numbers a channel and a bounded number of rows, however many pictures and steps it has."""
    recorders, made = [], measure.RecordingEngine.__init__

    def remember(self, *arguments) -> None:
        recorders.append(self)
        made(self, *arguments)

    monkeypatch.setattr(measure.RecordingEngine, "__init__", remember)
    for pictures, steps in ((4, 2), (16, 8)):
        bundle.calibrate(Plan(pictures=pictures, steps=steps))
        recorder = recorders.pop()
        rows = {name: sum(map(len, parts)) for name, parts in recorder._samples.items()}
        assert len(rows) == 12 and 60 < min(rows.values()) <= max(rows.values()) <= measure.ROWS
        assert all(
            part.ndim == 2 and part.dtype == np.float16 for parts in recorder._samples.values() for part in parts
        )
        assert len(recorder._largest) == 12 + 3 and all(array.ndim == 1 for array in recorder._largest.values())


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
