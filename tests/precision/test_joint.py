"""Int8 of networks that it does not cover in full: the build says the share, or refuses in one line."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from dit_export.bundle.build import build
from dit_export.checkpoints import Loaded
from dit_export.checkpoints.diffusers import read_process
from dit_export.cli import main
from dit_export.graph import onnxfile
from dit_export.graph.trace import trace_network
from dit_export.networks import Network
from dit_export.networks.families import family_network
from dit_export.passes import fuse
from dit_export.precision.layers import coverage, everything, find, kind, named, tokens
from dit_export.recipe import Recipe
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError
from dit_runtime.progress import Progress
from tests.networks import tiny
from tests.rules import traced_rule

CASES = {  # config, layers in int8, share of the weights in percent
    "sd3": ({}, 12 + 9, 98),  # the last block makes no text of its own
    "sd3.5": (tiny.SD3_5, 12 + 9 + 4, 98),  # the first block has a second attention, of the image alone
}


@pytest.mark.parametrize(("name", "backend"), [("sd3", "onnxruntime"), ("sd3.5", "openvino")])
def test_streams_that_one_attention_joins(tmp_path, capsys, one_thread, name, backend) -> None:
    config, layers, share = CASES[name]
    tiny.sd3(**config).save_pretrained(tmp_path / "sd3")
    options = ["--latents-only", "--precision", "int8", "--backend", backend, "--max-batch", "2"]
    options += ["--caption-tokens", str(tiny.TOKENS), "-o", str(tmp_path / "bundle")]
    with one_thread():
        assert main(["build", "--checkpoint", str(tmp_path / "sd3"), *options]) == 0
    assert f"int8: {share}% of the weights that every step multiplies with" in capsys.readouterr().out
    contract = manifest.read(tmp_path / "bundle")
    assert contract.built_with["quantized"] == pytest.approx(share / 100, abs=0.01)
    census = onnxfile.census(onnxfile.load(tmp_path / "bundle" / "denoiser.onnx"))
    counted = contract.built_with["passes"]["denoiser"]["quantize"]
    assert census["QuantizeLinear"] == counted and census["DequantizeLinear"] == 2 * counted
    worst = {check["name"]: check for check in json.loads((tmp_path / "bundle" / "parity.json").read_text())["checks"]}
    assert worst["denoiser: unguided, rel-L2"]["value"] > 1e-4  # it is not fp32 under another name
    assert counted == layers


def test_names_of_streams(tmp_path) -> None:
    network = family_network(tiny.sd3(), tokens=tiny.TOKENS)
    trace_network(network).save(tmp_path / "network.onnx", external_data=True)
    denoiser = fuse(onnxfile.load(tmp_path / "network.onnx"), network.ports, traced_rule(network)).denoiser
    layers = find(denoiser)
    names = {layer.name for layer in layers}
    inner = {name.removeprefix("transformer.") for name, _ in network.module.named_modules()}
    assert len(names) == len(layers) and names <= inner
    assert set(everything(layers)) == names  # the scores of an attention that joins streams stay float
    assert 0.95 < coverage(denoiser, layers) < 1
    assert named(layers, ["ff_context.net.2"]) == ["transformer_blocks.0.ff_context.net.2"]
    assert named(layers, ["ff"]) == [f"transformer_blocks.{n}.ff.net.{k}" for n in range(2) for k in ("0.proj", "2")]
    assert {kind(name) for name in named(layers, ["transformer_blocks.1"])} == {
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
    count = tokens(layers)
    assert (
        count["transformer_blocks.0.ff.net.2"] == 16 and count["transformer_blocks.0.ff_context.net.2"] == tiny.TOKENS
    )
    with pytest.raises(UsageError, match='expected one such as "transformer_blocks'):
        named(layers, ["block 0 fc2"])  # as layers were called before they had their weights' names


class Plain(nn.Module):
    """A convolution and a modulation: nothing that int8 covers."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.shift = nn.Conv1d(3, 3, 3, padding=1), nn.Linear(1, 3)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.mix(x) + self.shift(t[:, None])[..., None] + y[..., None]


def test_a_network_without_layers_is_refused_in_one_line(tmp_path, one_thread) -> None:
    torch.manual_seed(0)
    ports = (
        Port("x", "state", "float32", (3, 8)),
        Port("t", "time", "float32", ()),
        Port("y", "condition", "float32", (3,)),
    )
    network = Network(Plain().eval().requires_grad_(False), ports, model={"name": "plain"})
    loaded = Loaded(network, None, (), read_process(None, learned_variance=False), {"kind": "own"})
    recipe = Recipe(precision="int8", backend="onnxruntime", output=str(tmp_path / "bundle"))
    with one_thread(), pytest.raises(UsageError, match="int8 has no layer in this network; build fp32") as caught:
        build(recipe, Progress(), loaded=loaded)
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]
