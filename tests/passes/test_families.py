"""diffusers' transformers, small: their plain graphs are PyTorch's, and their stages together are the plain graph."""

from pathlib import Path

import numpy as np
import pytest

from dit_export.graph import onnxfile, trace
from dit_export.networks.families import family_network
from dit_export.passes.stages import split_stages
from tests.networks import tiny
from tests.passes.conftest import Run
from tests.passes.test_stages import feeds, run_stages

MAKERS = {"auraflow": tiny.auraflow, "flux2": tiny.flux2}


@pytest.mark.slow  # a trace each
@pytest.mark.parametrize("name", MAKERS)
def test_stages_together_are_the_whole(name: str, tmp_path: Path, run: Run) -> None:
    network = family_network(MAKERS[name](), (8, 12), tiny.TOKENS)
    trace.trace_network(network).save(tmp_path / "network.onnx", external_data=True)
    graph = onnxfile.load(tmp_path / "network.onnx")
    stages, denoiser, _ = split_stages(onnxfile.load(tmp_path / "network.onnx"), network.ports)
    for rows in (1, 2, 3):
        inputs = {port: value.numpy() for port, value in tiny.inputs(network, rows).items()}
        expected = tiny.run(network, tiny.inputs(network, rows)).numpy()
        (whole,) = run(graph, inputs)
        assert np.linalg.norm(whole - expected) <= 1e-5 * np.linalg.norm(expected)
        values = run_stages(stages, inputs, run)
        (again,) = run(denoiser, feeds(denoiser, values))
        np.testing.assert_array_equal(again, whole)
        for crossed in feeds(denoiser, values).keys() - {network.state.name}:
            (broken,) = run(denoiser, feeds(denoiser, values | {crossed: -values[crossed]}))
            assert np.abs(broken - whole).max() > 1e-3 * np.abs(whole).max(), crossed
