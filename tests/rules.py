"""Traced rules of guidance, as a build has them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import onnx_graphsurgeon as gs
import torch

from dit_export.graph import onnxfile, trace
from dit_export.networks import Network
from dit_runtime.bundle.manifest import Port


def traced_rule(network: Network) -> gs.Graph | None:
    """Return a network's rule; None where it mixes nothing."""
    if not network.mixes_guidance:
        return None
    with tempfile.TemporaryDirectory() as folder:
        trace.trace_rule(network).save(Path(folder) / "rule.onnx")
        return onnxfile.load(Path(folder) / "rule.onnx")


def linear(shape: tuple[int, ...], channels: int | None = None) -> gs.Graph:
    """Return the linear rule for a state of this shape, over its first channels; traced once."""
    return _linear(shape, channels).copy()


@functools.cache
def _linear(shape: tuple[int, ...], channels: int | None) -> gs.Graph:
    ports = (
        Port("x", "state", "float32", shape),
        Port("t", "time", "float32", ()),
        Port("c", "condition", "float32", ()),
    )
    rule = traced_rule(Network(torch.nn.Identity(), ports, guided_channels=channels))
    assert rule is not None
    return rule
