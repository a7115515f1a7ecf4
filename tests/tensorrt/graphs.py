"""Graphs to compile: a network traced and fused, and its stages as a bundle has them."""

from __future__ import annotations

from pathlib import Path

import onnx_graphsurgeon as gs
import torch

from dit_export.graph import onnxfile, trace
from dit_export.networks import Network
from dit_export.networks.dit import DiT, dit_network
from dit_export.networks.spec import ModelSpec
from dit_export.passes import Fused, fuse, require
from dit_runtime.bundle.manifest import Stage
from tests.rules import traced_rule


def dit(spec: ModelSpec) -> Network:
    torch.manual_seed(0)
    return dit_network(DiT(spec).eval().requires_grad_(False))


def traced(network: Network, folder: Path) -> Path:
    trace.trace_network(network).save(folder / "network.onnx", external_data=True)
    return folder / "network.onnx"


def fuse_network(path: Path, network: Network) -> Fused:
    fused = fuse(onnxfile.load(path), network.ports, traced_rule(network))
    require(fused.counts, network.counts, fused.misses)
    return fused


def save(graph: gs.Graph, folder: Path, precision: str, name: str = "denoiser", runs: str = "step") -> Stage:
    file = f"{name}.onnx"
    onnxfile.save(graph, folder / file)
    (folder / f"{file}.data").touch()
    return Stage(name, runs, *onnxfile.signature(graph), file, max_batch=2, precision=precision)
