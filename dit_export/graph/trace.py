"""PyTorch modules to ONNX files, through torch.export, with named inputs and outputs and a free batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.fx import GraphModule

from dit_export.graph.repairs import REPAIRS, split_boolean_wheres
from dit_export.networks import Network
from dit_runtime.bundle.manifest import Port

OPSET = 23  # the first with Attention, so that a backend's passes choose its form


def export(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> torch.onnx.ONNXProgram:
    """`module` as ONNX, axis 0 of every input and output free; `save(…, external_data=True)` has no 2 GB limit."""
    # A named Dim wants a range, and diffusers' upsampling branches at 64 rows; several inputs have as many rows each.
    rows: Any = torch.export.Dim.DYNAMIC if len(inputs) == 1 else torch.export.Dim("rows")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        shapes = {name: {0: rows} for name in inputs}
        program = torch.export.export(module, (), dict(inputs), dynamic_shapes=shapes, strict=False)
        program = torch.export.export(repaired(program), (), dict(inputs), dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            kwargs=dict(inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    assert exported is not None
    split_boolean_wheres(exported.model.graph)
    return exported


def repaired(program: torch.export.ExportedProgram) -> GraphModule:
    """Return the program as a module without in-place operations, with every repair applied."""
    module = program.run_decompositions({}).module()
    assert isinstance(module, GraphModule)
    for repair in REPAIRS:
        repair(module)
    module.recompile()
    return module


def trace_network(network: Network) -> torch.onnx.ONNXProgram:
    """Trace the plain graph: inputs named as the ports, output `prediction` (with the variance)."""
    return export(network.module, examples(network.ports), ["prediction"])


def examples(ports: Sequence[Port], rows: int = 2) -> dict[str, Tensor]:
    """Return values that every network takes: masks of ones, everything else zero."""
    return {
        port.name: torch.full((rows, *port.shape), int(bool(port.masks)), dtype=getattr(torch, port.dtype))
        for port in ports
    }


class Decoder(nn.Module):
    """images = clamp(VAE(latents / scaling + shift) / 2 + 1/2), in [0, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.scaling = float(vae.config.scaling_factor)
        self.shift = float(vae.config.shift_factor or 0.0)

    def forward(self, latents: Tensor) -> Tensor:
        latents = latents / self.scaling + self.shift  # (B, C, H, W)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return (self.decoder(latents) / 2 + 0.5).clamp(0, 1)  # (B, 3, 8H, 8W)

    def expected_counts(self) -> dict[str, int]:
        """What each pass must find in this decoder's graph."""

        def count(*kinds: type[nn.Module]) -> int:
            return sum(isinstance(module, kinds) for module in self.modules())

        doubled = count(Upsample2D)  # their convolutions become four each
        return {
            "subpixel": doubled,
            "group_norm": count(nn.GroupNorm),
            "plain_attention": count(Attention),
            "split_qkv": 0,
            "dynamic": 0,
            "cast_to_half": count(nn.Conv2d, nn.Linear, Attention) + 3 * doubled,
        }


def export_decoder(decoder: Decoder, latents_shape: Sequence[int]) -> torch.onnx.ONNXProgram:
    return export(decoder, {"latents": torch.zeros(2, *latents_shape)}, ["images"])
