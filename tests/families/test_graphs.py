"""The plain graphs of families that need the whole of tracing: against PyTorch, and against their two halves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from numpy.typing import NDArray

from dit_export.graph import onnxfile, trace
from dit_export.networks import Network
from dit_export.networks.families import family_network
from dit_export.passes.attention import plain_attention
from dit_export.passes.hoist import hoist
from tests.families.test_lumina2 import with_lengths
from tests.networks import tiny

SIZE = (8, 12)
NETWORKS: dict[str, Callable[[], Network]] = {
    "qwen-image": lambda: family_network(tiny.qwen_image(), SIZE, 96),
    "lumina2": lambda: family_network(tiny.lumina2(), SIZE, 96),
    "z-image": lambda: family_network(tiny.z_image(), SIZE, 96),
}
LENGTHS = (5, 96, 33)

Arrays = dict[str, NDArray[np.float32]]


def run(graph: gs.Graph, inputs: Arrays, path: Path) -> list[NDArray[np.float32]]:
    plain_attention(graph)
    onnxfile.save(graph, path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_and_its_halves(tmp_path, name) -> None:
    network = NETWORKS[name]()
    trace.trace_network(network).save(tmp_path / "plain.onnx", external_data=True)

    def plain() -> gs.Graph:
        return onnxfile.load(tmp_path / "plain.onnx")

    for rows in (1, 2, 3):
        values = with_lengths(tiny.inputs(network, rows), list(LENGTHS[:rows]))
        expected, inputs = tiny.run(network, values).numpy(), {key: value.numpy() for key, value in values.items()}
        (whole,) = run(plain(), inputs, tmp_path / "whole.onnx")
        assert np.linalg.norm(whole - expected) <= 1e-5 * np.linalg.norm(expected)

    hoisted = hoist(plain(), ["latents"], ["timesteps"])
    ahead = {key: value for key, value in inputs.items() if key != "latents"}
    frontier = dict(zip(hoisted.frontier, run(hoisted.invariant, ahead, tmp_path / "ahead.onnx"), strict=True))
    frontier |= {key: inputs[key] for key in hoisted.cut.direct}
    (again,) = run(hoisted.loop, {"latents": inputs["latents"], **frontier}, tmp_path / "loop.onnx")
    np.testing.assert_array_equal(again, whole)
    first = hoisted.frontier[0]  # teeth: one wrong tensor shows
    changed = {"latents": inputs["latents"], **frontier, first: -frontier[first]}
    (broken,) = run(hoisted.loop, changed, tmp_path / "loop.onnx")
    assert np.linalg.norm(broken - whole) > 1e-3 * np.linalg.norm(whole)
