"""Traced networks: ONNX Runtime against PyTorch, as a whole and tensor by tensor."""

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch

from dit_export.graph import onnxfile, trace
from dit_export.graph.oracle import Oracle
from dit_export.networks.families import family_network
from dit_export.passes import fuse, require
from dit_export.passes.attention import plain_attention
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError
from tests.networks import tiny
from tests.networks.conftest import NETWORKS
from tests.rules import traced_rule

TOLERANCE = 1e-5  # fp32 sums in another order; measured 6e-7


def run(graph: gs.Graph, path, values: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    plain_attention(graph)  # as every graph for ONNX Runtime is lowered
    onnxfile.save(graph, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {name: value.numpy() for name, value in values.items()}), strict=True))


def distance(got: np.ndarray, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float(np.abs(got - expected.numpy()).max() / max(expected.abs().max(), 1e-30))


@pytest.mark.parametrize("name", NETWORKS)
def test_onnxruntime_is_pytorch(traced, tmp_path, name) -> None:
    network, _, path, span = traced(name)
    graph = onnxfile.load(path)
    assert [tensor.name for tensor in graph.inputs] == [port.name for port in network.ports]
    rows = {tensor.shape[0] for tensor in graph.inputs + graph.outputs}
    assert len(rows) == 1 and isinstance(rows.pop(), str)  # one free dimension, which all share
    for count in (1, 2, 3):
        values = tiny.inputs(network, count, seed=count, span=span)
        got = run(onnxfile.load(path), tmp_path / "lowered.onnx", values)["prediction"]
        assert distance(got, tiny.run(network, values)) <= TOLERANCE


@pytest.mark.parametrize("name", NETWORKS)
def test_the_oracle_is_the_graph(traced, tmp_path, name) -> None:
    """Each float tensor of the ONNX graph that is not within one operator of PyTorch has the oracle's value."""
    network, program, path, span = traced(name)
    oracle, graph = Oracle(program.exported_program), onnxfile.load(path)
    floats = [tensor for node in graph.nodes for tensor in node.outputs if tensor.dtype == np.float32]
    valued = [tensor for tensor in floats if tensor.name in oracle.names]
    assert {tensor.inputs[0].op for tensor in floats if tensor not in valued} <= {
        "MatMul",  # before the bias is added
        "Sigmoid",  # of x · sigmoid(x)
        "Unsqueeze",  # of a mask that is repeated for all heads
        "Expand",
    }
    graph.outputs = valued
    values = tiny.inputs(network, 3, seed=3, span=span)
    got = run(graph, tmp_path / "tapped.onnx", values)
    expected = oracle([tensor.name for tensor in valued], **values)
    assert len(valued) > 90 and expected["prediction"].shape[0] == 3
    for tensor_name, value in expected.items():
        assert distance(got[tensor_name], value) <= TOLERANCE, tensor_name
    other = oracle(["prediction"], **values | {network.state.name: 1.01 * values[network.state.name]})["prediction"]
    assert distance(got["prediction"], other) > 10 * TOLERANCE


def test_the_oracle_refuses_other_names(traced) -> None:
    network, program, _, _ = traced("dit")
    with pytest.raises(UsageError, match="nothing: the traced program has no tensor of this name"):
        Oracle(program.exported_program)(["nothing"], **tiny.inputs(network, 1))


@pytest.mark.parametrize("name", NETWORKS)
def test_constants_are_pytorchs(traced, name) -> None:
    """No exp and no range is left to a runtime's own rounding: frequencies are folded."""
    _, _, path, _ = traced(name)
    assert not {"Exp", "Range", "Pow", "Log"} & onnxfile.census(onnxfile.load(path)).keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_keep_their_names(traced, name) -> None:
    network, _, path, _ = traced(name)
    constants = {tensor.name for tensor in onnxfile.constants(onnxfile.load(path))}
    biases = {key for key, weight in network.module.named_parameters() if weight.ndim == 1}
    assert biases <= constants


def test_a_decoder_reads_the_state(tmp_path) -> None:
    class Loud(torch.nn.Module):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return 2 * latents

    trace.export_decoder(Loud(), Port("sound", "state", "float32", (3, 4))).save(tmp_path / "decoder.onnx")
    graph = onnxfile.load(tmp_path / "decoder.onnx")
    assert [tensor.name for tensor in graph.inputs] == ["sound"]
    assert [tensor.name for tensor in graph.outputs] == ["images"]


@pytest.mark.parametrize("name", NETWORKS)
def test_passes_fire_as_predicted(traced, name) -> None:
    """An exporter whose graphs look otherwise fails here, and stops a build."""
    network, _, path, _ = traced(name)
    fused = fuse(onnxfile.load(path), network.ports, traced_rule(network))
    counts = fused.counts | {"plain_attention": plain_attention(fused.denoiser)}
    assert {"share_rows", "guide", "plain_attention"} <= network.counts.keys()
    require(counts, network.counts, fused.misses)
    for missed in counts.keys() & network.counts.keys():
        with pytest.raises(RuntimeError, match=f"{missed}: {counts[missed] - 1}, expected {counts[missed]}"):
            require(counts | {missed: counts[missed] - 1}, network.counts)


@pytest.mark.parametrize("make", [lambda: tiny.pixart(num_layers=3), lambda: tiny.sd3(num_layers=3)])
def test_predictions_follow_the_depth(tmp_path, make) -> None:
    network = family_network(make(), tokens=tiny.TOKENS)
    trace.trace_network(network).save(tmp_path / "network.onnx", external_data=True)
    fused = fuse(onnxfile.load(tmp_path / "network.onnx"), network.ports, traced_rule(network))
    require(fused.counts | {"plain_attention": plain_attention(fused.denoiser)}, network.counts, fused.misses)
