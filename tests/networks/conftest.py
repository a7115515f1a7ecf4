"""Tiny networks, each traced once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dit_export.checkpoints.synthetic import synthetic_dit
from dit_export.graph import trace
from dit_export.networks import Network
from dit_export.networks.dit import dit_network
from dit_export.networks.families import family_network
from dit_export.networks.spec import ModelSpec
from tests.networks import tiny

DIT = ModelSpec(depth=2, hidden=96, heads=3, patch=2, latent_size=8, num_classes=10)
NETWORKS: dict[str, Callable[[], Network]] = {
    "dit": lambda: dit_network(synthetic_dit(DIT, 0)),
    "pixart": lambda: family_network(
        tiny.pixart(use_additional_conditions=True, interpolation_scale=2), (8, 12), tiny.TOKENS
    ),
    "sd3": lambda: family_network(tiny.sd3(**tiny.SD3_5), (12, 8), tiny.TOKENS),
}
SPANS = {"dit": 1000.0, "pixart": 1000.0, "sd3": 1.0}


class Traced(NamedTuple):
    network: Network
    program: torch.onnx.ONNXProgram
    path: Path
    span: float  # of the time port


@pytest.fixture(scope="session")
def traced(tmp_path_factory, one_thread) -> Callable[[str], Traced]:
    @functools.cache
    def trace_once(name: str) -> Traced:
        network, path = NETWORKS[name](), tmp_path_factory.mktemp(name) / "network.onnx"
        with one_thread():
            program = trace.trace_network(network)
        program.save(path, external_data=True)
        return Traced(network, program, path, SPANS[name])

    return trace_once
