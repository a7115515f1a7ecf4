"""Streamed networks: the same answers and the same graph, in the memory of the largest part."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dit_export.checkpoints.families import parameter_names, streamed
from dit_export.checkpoints.files import Weights, open_weights
from dit_export.graph import onnxfile, trace
from dit_export.graph.oracle import Oracle
from dit_export.networks import Network
from dit_export.networks.families import family_network
from dit_export.networks.streaming import stream
from dit_runtime.errors import UsageError
from tests.networks import tiny

CASES = {"pixart": lambda: tiny.pixart(), "sd3": lambda: tiny.sd3(**tiny.SD3_5)}


FAMILIES = {  # and sizes of latents
    "auraflow": (tiny.auraflow, (8, 12)),
    "chroma": (tiny.chroma, (8, 12)),
    "cogview4": (tiny.cogview4, (8, 12)),
    "flux": (tiny.flux, (8, 12)),
    "flux2": (tiny.flux2, (8, 12)),
    "hunyuandit": (tiny.hunyuan_dit, (8, 12)),
    "ltx": (tiny.ltx, (2, 4, 6)),
    "lumina2": (tiny.lumina2, (8, 12)),
    "pixart": (tiny.pixart, (8, 12)),
    "qwenimage": (tiny.qwen_image, (8, 12)),
    "sana": (tiny.sana, (8, 12)),
    "sd3": (tiny.sd3, (8, 12)),
    "zimage": (tiny.z_image, (8, 12)),
}


class Watched(Mapping[str, Tensor]):
    """Weights that count the bytes of those that are in use."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self.bytes = self.peak = 0

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name].clone()
        self.bytes += weight.nbytes
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(weight.untyped_storage(), self._drop, weight.nbytes)
        return weight

    def _drop(self, count: int) -> None:
        self.bytes -= count

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def streamed_of(transformer: nn.Module, weights: Mapping[str, Tensor]) -> Network:
    names = parameter_names(transformer)
    return streamed(network_of(transformer), weights, names)


def network_of(transformer: nn.Module) -> Network:
    return family_network(transformer, tokens=tiny.TOKENS)


@pytest.fixture(params=CASES)
def pair(request, tmp_path) -> tuple[Network, Network, Watched]:
    """A network, the same one streamed from a file, and its weights."""
    transformer = CASES[request.param]()
    save_file(transformer.state_dict(), tmp_path / "weights.safetensors")
    watched = Watched(Weights([tmp_path / "weights.safetensors"]))
    return network_of(transformer), streamed_of(CASES[request.param](), watched), watched


def test_the_same_answers(pair) -> None:
    plain, network, watched = pair
    values, tables = tiny.inputs(plain, 2), watched.bytes
    expected = tiny.run(plain, values)
    assert torch.equal(tiny.run(network, values), expected)
    parts = [sum(p.nbytes for p in part.parameters(recurse=False)) for part in plain.module.modules()]
    assert watched.peak <= 1.1 * max(parts) < sum(parts) / 4 and watched.bytes == tables < sum(parts) / 50
    linears = [part for part in network.module.modules() if isinstance(part, nn.Linear)]
    assert len(linears) > 12 and all(isinstance(linear.weight, FakeTensor) for linear in linears)

    stream(network.module, {name: 1.01 * value for name, value in plain.module.state_dict().items()})
    assert not torch.allclose(tiny.run(network, values), expected, rtol=1e-3)


def test_the_same_graph(pair, tmp_path) -> None:
    plain, network, watched = pair
    trace.trace_network(plain).save(tmp_path / "plain.onnx", external_data=True)
    program = trace.trace_network(network)
    watched.peak = 0
    program.save(tmp_path / "streamed.onnx", external_data=True)
    largest = max(parameter.nbytes for parameter in plain.module.parameters())
    assert watched.peak <= 1.2 * largest

    expected, got = (onnxfile.load(tmp_path / f"{name}.onnx") for name in ("plain", "streamed"))
    assert [(node.op, node.attrs) for node in got.nodes] == [(node.op, node.attrs) for node in expected.nodes]
    weights = [{tensor.name: tensor.values for tensor in onnxfile.constants(graph)} for graph in (expected, got)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert np.array_equal(value, weights[1][name]), name

    products = {node.inputs[1].name: node.inputs[1].values for node in got.nodes if node.op == "MatMul"}
    linears = {name: weight for name, weight in plain.module.named_parameters() if name in products}
    assert len(linears) >= 12 and len(linears) == len(products)
    for name, weight in linears.items():  # as MatMul reads it
        assert np.array_equal(products[name], weight.T.numpy()), name

    values = tiny.inputs(plain, 2)
    oracle = Oracle(program.exported_program, network.weights)
    answer = oracle(["prediction"], **values)["prediction"]
    assert torch.allclose(answer, tiny.run(plain, values), rtol=1e-4, atol=1e-5)
    assert watched.peak <= 1.2 * largest


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name) -> None:
    """No family reads a parameter that belongs to a part which does not run."""
    make, size = FAMILIES[name]
    transformer, own = make(), make()
    weights, names = transformer.state_dict(), parameter_names(own)
    plain = family_network(transformer, size, 32)
    network = streamed(family_network(own, size, 32), weights, names)
    values = tiny.inputs(plain, 2)
    assert torch.equal(tiny.run(network, values), tiny.run(plain, values))


def test_half_precision_is_cast_when_it_is_read(tmp_path) -> None:
    transformer = tiny.sd3()
    state = {name: value.bfloat16() for name, value in transformer.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    weights = Weights([tmp_path / "weights.safetensors"])
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    transformer.load_state_dict({name: value.float() for name, value in state.items()})
    own = tiny.sd3()
    plain, network = network_of(transformer), streamed_of(own, weights)
    values = tiny.inputs(plain, 2)
    with torch.no_grad():
        own.pos_embed.pos_embed.copy_(transformer.pos_embed.pos_embed)  # buffers are the reader's
    assert torch.equal(tiny.run(network, values), tiny.run(plain, values))
    trace.trace_network(network).save(tmp_path / "network.onnx", external_data=True)
    constants = {t.name: t.values for t in onnxfile.constants(onnxfile.load(tmp_path / "network.onnx"))}
    name = "transformer.transformer_blocks.0.attn.to_q.weight"
    assert constants[name].dtype == np.float32
    assert np.array_equal(constants[name], plain.module.state_dict()[name].T.numpy())


def test_a_part_that_reads_anothers_weights_has_no_answer() -> None:
    class Borrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.inner.weight

    module = Borrowing().requires_grad_(False)
    weights = module.state_dict()
    stream(module, weights)
    with torch.no_grad():
        assert isinstance(module(torch.ones(2, 3)), FakeTensor)


def test_files_of_weights(tmp_path) -> None:
    for n in range(2):
        save_file({f"part{n}": torch.full((3,), float(n))}, tmp_path / f"{n}.safetensors")
    weights = open_weights([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    assert {name: value.tolist() for name, value in weights.items()} == {"part0": [0] * 3, "part1": [1] * 3}
    assert "part2" not in weights
    (tmp_path / "1.safetensors").write_bytes((tmp_path / "1.safetensors").read_bytes()[:-4])
    with pytest.raises(UsageError, match=r"1\.safetensors: damaged"):
        open_weights([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
