"""Tiny networks of several ports, and their bundles straight from trace and fuse: a second each, no checkpoint."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_export.graph import onnxfile
from dit_export.graph.oracle import Oracle
from dit_export.graph.trace import trace_network
from dit_export.networks import Network
from dit_export.passes import fuse
from dit_export.verify import traced
from dit_export.verify.reference import make_reference, save_reference
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Guidance, Manifest, Port, Stage
from dit_runtime.sampling.process import Process, Sampler
from dit_runtime.verify import Reference
from tests.rules import traced_rule

WIDTH, TOKENS, CHANNELS, WORDS, CLASSES = 16, 6, 4, 5, 7
STATE, TIME = Port("x", "state", "float32", (CHANNELS, TOKENS)), Port("t", "time", "float32", ())
LABELS = Port("labels", "condition", "int64", (), size=CLASSES + 1)
PROMPT = Port("prompt", "condition", "float32", (WORDS, 3))
MASK = Port("mask", "condition", "float32", (WORDS,), masks="prompt")
NULL = {"labels": CLASSES}
KINDS = ("labels", "prompt", "both", "alone")  # by what they are conditioned on


class Attention(nn.Module):
    def __init__(self, source: int) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(source, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, source: Tensor, bias: Tensor | None = None) -> Tensor:
        k, v = self.kv(source).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q(x), k, v))
        bias = None if bias is None else bias[:, None, None].expand(-1, -1, x.shape[1], -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, prompted: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, 1e-6, elementwise_affine=False) for _ in range(2))
        self.attn, self.cross = Attention(WIDTH), Attention(WIDTH) if prompted else None
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(approximate="tanh"), nn.Linear(32, WIDTH))
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, c: Tensor, words: Tensor | None, bias: Tensor | None) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale) + shift
        x = x + gate * self.attn(h, h)
        if self.cross is not None:
            x = x + self.cross(x, words, bias)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Tiny(nn.Module):
    def __init__(self, labelled: bool, prompted: bool, variance: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(CHANNELS, WIDTH)
        self.time = nn.Sequential(nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(CLASSES + 1, WIDTH) if labelled else None
        self.words = nn.Linear(3, WIDTH) if prompted else None
        self.blocks = nn.ModuleList(Block(prompted) for _ in range(2))
        self.leave = nn.Linear(WIDTH, CHANNELS * (2 if variance else 1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        prompt: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        angles = t[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        c = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        c = F.silu(c if self.label is None else c + self.label(labels))
        words = None if self.words is None else self.words(prompt)
        bias = None if mask is None else (mask - 1) * 1e4
        h = self.enter(x.transpose(1, 2))
        for block in self.blocks:
            h = block(h, c, words, bias)
        return self.leave(h).transpose(1, 2)


def network(kind: str, variance: bool = False) -> Network:
    torch.manual_seed(0)
    labelled, prompted = kind in ("labels", "both"), kind in ("prompt", "both")
    module = Tiny(labelled, prompted, variance).eval().requires_grad_(False)
    for block in module.blocks:
        nn.init.normal_(block.modulation.weight, std=0.3)
    nn.init.normal_(module.time[2].weight, std=1.0)  # or five percent of the schedule would hardly be seen
    ports = [STATE, TIME, *[LABELS] * labelled, *[PROMPT, MASK] * prompted]
    null = NULL if labelled else {}
    return Network(module, tuple(ports), null=null, learned_variance=variance, model={"name": f"tiny {kind}"})


@dataclass(frozen=True)
class Bundle:
    folder: Path
    network: Network
    oracle: Oracle
    reference: Reference


def write(folder: Path, net: Network) -> Bundle:
    """Write the bundle as a build does, with portable graphs in fp32 and no decoder."""
    folder.mkdir(exist_ok=True)
    program = trace_network(net)
    with tempfile.TemporaryDirectory() as plain:  # elsewhere, or the stages would share its file of weights
        program.save(Path(plain) / "network.onnx", external_data=True)
        fused = fuse(onnxfile.load(Path(plain) / "network.onnx"), net.ports, traced_rule(net))
    stages = []
    for name, runs, graph, _ in (*fused.stages, ("denoiser", "step", fused.denoiser, ())):
        onnxfile.save(graph, folder / f"{name}.onnx")
        (folder / f"{name}.onnx.data").touch()
        stages.append(Stage(name, runs, *onnxfile.signature(graph), f"{name}.onnx", max_batch=4))
    process = Process(sampler=Sampler(solver="ddim"))
    oracle = Oracle(program.exported_program)
    origins = traced.trace_back(fused.denoiser, [pack for stage in fused.stages for pack in stage.packs], oracle)
    reference = make_reference(net, None, process, oracle, origins.packs, {}, lambda done, steps: None)
    save_reference(folder, reference, origins.packs, {})
    traced.write(folder, origins)
    contract = Manifest(
        model=net.model,
        ports=net.ports,
        null=net.null,
        labels=(),
        guidance=Guidance(net.guided_channels or CHANNELS, net.unguided_up_to_one, net.guidance, net.guidance_port),
        process=process,
        stages=tuple(stages),
        files=manifest.describe_files(folder),
        source={"kind": "synthetic"},
    )
    manifest.write(folder, contract)
    return Bundle(folder, net, oracle, reference)
