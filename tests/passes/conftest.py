"""A small DiT, sensitive to all its inputs, and its plain ONNX graph, traced once."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch
from torch import nn

from dit_export.graph import onnxfile, trace
from dit_export.networks.dit import DiT, dit_network
from dit_export.networks.spec import ModelSpec, expected_counts
from dit_export.passes import Fused, fuse, require
from dit_runtime.bundle.manifest import Port
from tests.rules import linear

SMALL = ModelSpec(depth=2, hidden=48, heads=3, patch=2, latent_size=8, num_classes=10, embedders=2)
Run = Callable[[gs.Graph, dict[str, np.ndarray]], list[np.ndarray]]


def ports_of(spec: ModelSpec) -> tuple[Port, ...]:
    """Return what a DiT of this spec takes."""
    return (
        Port("latents", "state", "float32", spec.latent_shape),
        Port("timesteps", "time", "float32", ()),
        Port("labels", "condition", "int64", (), spec.num_classes + 1),
    )


def fuse_dit(graph: gs.Graph, spec: ModelSpec) -> Fused:
    """Fuse a DiT's plain graph, with the counts that its spec predicts."""
    fused = fuse(graph, ports_of(spec), linear(spec.latent_shape, spec.guided_channels))
    require(fused.counts, expected_counts(spec), fused.misses)
    return fused


def sensitive(model: nn.Module) -> nn.Module:
    """Give the network random weights to which every input matters."""
    torch.manual_seed(0)
    for parameter in model.eval().requires_grad_(False).parameters():
        parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
    return model


def random_inputs(ports: Sequence[Port], rows: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = {port.name: rng.normal(size=(rows, *port.shape)).astype(np.float32) for port in ports}
    inputs |= {port.name: rng.uniform(0, 999, rows).astype(np.float32) for port in ports if port.role == "time"}
    inputs |= {port.name: (inputs[port.name] > -1).astype(np.float32) for port in ports if port.masks}
    return inputs | {port.name: rng.integers(0, port.size, (rows, *port.shape)) for port in ports if port.size}


@pytest.fixture(scope="session")
def small_dit() -> DiT:
    return sensitive(DiT(SMALL))


@pytest.fixture(scope="session")
def plain_path(small_dit: DiT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "dit.onnx"
    trace.trace_network(dit_network(small_dit)).save(path, external_data=True)
    return path


@pytest.fixture
def plain(plain_path: Path) -> gs.Graph:
    """A fresh copy: passes work in place."""
    return onnxfile.load(plain_path)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Saves a graph as builds do (which checks it) and runs it."""

    def run_graph(graph: gs.Graph, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        onnxfile.save(graph, tmp_path / "graph.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
        return session.run(None, inputs)

    return run_graph
