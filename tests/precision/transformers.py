"""Tiny transformers of diffusers that make every kind of layer, with channels that stand out where layers read them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.models.normalization import LuminaLayerNormContinuous
from diffusers.models.transformers.transformer_lumina2 import Lumina2TransformerBlock
from torch import Tensor, nn

from dit_export.networks import Network
from dit_runtime.bundle.manifest import Port
from tests.networks import tiny

CHANNELS, STRETCH = (5, 23, 41), (8.0, 14.0, 20.0)  # which stand out, and by how much
IMAGE, TEXT = 16, 12  # tokens
HEADS = {"num_attention_heads": 2, "attention_head_dim": 32, "joint_attention_dim": 48}
CAPTIONS = Port("captions", "condition", "float32", (TEXT, 48))
MODULATED = {6: (0, 1, 3, 4), 4: (0, 2), 3: (0, 1)}  # shifts and scales, of as many vectors as a norm has
GATES = {6: (2, 5), 4: (1, 3), 3: (2,)}


class Flux(nn.Module):
    """Two streams that one attention joins, then one stream whose attention and MLP share a linear."""

    def __init__(self) -> None:
        super().__init__()
        widths = {"in_channels": 16, "pooled_projection_dim": 40, "axes_dims_rope": (8, 12, 12)}
        self.transformer = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, **HEADS, **widths)

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Tensor, pooled: Tensor) -> Tensor:
        places = {"img_ids": torch.arange(3 * IMAGE).view(IMAGE, 3) / 3.0, "txt_ids": torch.zeros(TEXT, 3)}
        conditions = {"encoder_hidden_states": captions, "pooled_projections": pooled}
        return self.transformer(latents, timestep=timesteps / 1000, **conditions, **places, return_dict=False)[0]


class AuraFlow(nn.Module):
    """As Flux, with gated MLPs and no biases."""

    def __init__(self) -> None:
        super().__init__()
        widths = {"sample_size": 8, "caption_projection_dim": 64, "pos_embed_max_size": 64}
        self.transformer = diffusers.AuraFlowTransformer2DModel(
            num_mmdit_layers=1, num_single_dit_layers=1, **HEADS, **widths
        )

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Tensor) -> Tensor:
        return self.transformer(latents, captions, timestep=timesteps / 1000, return_dict=False)[0]


class Sana(nn.Module):
    """Linear attention, a cross-attention that reads the residual stream, and 1 × 1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        heads = {"num_attention_heads": 2, "attention_head_dim": 32, "num_cross_attention_heads": 2}
        widths = {"cross_attention_head_dim": 32, "cross_attention_dim": 64, "caption_channels": 48}
        sizes = {"in_channels": 8, "out_channels": 8, "sample_size": 4, "num_layers": 1}
        self.transformer = diffusers.SanaTransformer2DModel(**heads, **widths, **sizes)

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Tensor) -> Tensor:
        return self.transformer(latents, captions, timesteps, return_dict=False)[0]


class Lumina(nn.Module):
    """Lumina 2's block: norms with gains of their own, heads that share keys and values, a gated MLP, no biases."""

    def __init__(self) -> None:
        super().__init__()
        norms = {"multiple_of": 16, "ffn_dim_multiplier": None, "norm_eps": 1e-5}
        self.embed, self.time, self.label = nn.Linear(16, 96), nn.Linear(1, 96), nn.Linear(40, 96)
        self.layers = nn.ModuleList([Lumina2TransformerBlock(96, num_attention_heads=4, num_kv_heads=2, **norms)])
        self.head = LuminaLayerNormContinuous(96, 96, elementwise_affine=False, eps=1e-6, out_dim=16)

    def forward(self, latents: Tensor, timesteps: Tensor, pooled: Tensor) -> Tensor:
        condition, x = self.time(timesteps[:, None] / 1000) + self.label(pooled), self.embed(latents)
        for layer in self.layers:
            x = layer(x, None, None, condition)
        return self.head(x, condition)


class Case(NamedTuple):
    module: type[nn.Module]
    state: tuple[int, ...]
    conditions: tuple[Port, ...]
    readers: str  # of modulated norms
    makers: Mapping[str, str]  # modules that make channels, and those that read them
    shared: Mapping[int, Sequence[int]] = {}  # which channels are read of each that is made; empty: the same


POOLED = Port("pooled", "condition", "float32", (40,))
QKV, JOINT, OUT = r"\.to_[qkv]$", r"\.(to_[qkv]|add_[qkv]_proj)$", r"\.(to_out\.0|to_add_out)$"
VALUES = r"\.(to_v|add_v_proj)$"
CASES = {
    "Flux": Case(
        Flux,
        (IMAGE, 16),
        (CAPTIONS, POOLED),
        JOINT + r"|net\.0\.proj$|proj_mlp$",
        {VALUES: OUT + r"|blocks.*proj_out$"},
    ),
    "AuraFlow": Case(
        AuraFlow,
        (4, 8, 8),
        (CAPTIONS,),
        JOINT + r"|blocks.*\.linear_[12]$",
        {VALUES: OUT, r"blocks.*\.linear_2$": r"out_projection$"},
    ),
    "Sana": Case(
        Sana,
        (8, 4, 4),
        (CAPTIONS,),
        r"attn1\.to_[qkv]$|conv_inverted$",
        {VALUES: OUT, r"conv_depth$": r"conv_point$"},
    ),
    "Lumina": Case(
        Lumina,
        (IMAGE, 16),
        (POOLED,),
        QKV + r"|\.linear_[13]$",
        {VALUES: OUT, r"\.linear_3$": r"\.linear_2$"},
        {5: (5, 29), 23: (23, 47), 41: (65, 89)},  # of 4 heads of 24, two and two with the same values
    ),
}


def network(name: str) -> Network:
    """Return a network of random weights with outlying channels."""
    case = CASES[name]
    module = tiny.randomize(case.module())
    _plant(module, case)
    ports = (Port("latents", "state", "float32", case.state), Port("timesteps", "time", "float32", ()))
    return Network(module, (*ports, *case.conditions), model={"name": name})


@torch.no_grad()
def _plant(module: nn.Module, case: Case) -> None:
    modules = dict(module.named_modules())
    channels, s = torch.tensor(CHANNELS), torch.tensor(STRETCH)

    def matching(pattern: str) -> list[Any]:
        return [found for name, found in modules.items() if re.search(pattern, name) and hasattr(found, "weight")]

    for name, linear in modules.items():  # adaLN's
        if isinstance(linear, nn.Linear) and re.search(r"norm1?(_context)?\.linear$|time_embed\.linear$", name):
            width = linear.in_features
            count = linear.out_features // width
            rows = torch.cat([index * width + channels for index in MODULATED.get(count, ())] or [channels[:0]])
            for parameter in filter(lambda own: own is not None, (linear.weight, linear.bias)):
                stretch = s.repeat(len(rows) // len(s))
                parameter[rows] *= stretch.view(-1, *[1] * (parameter.ndim - 1))
                for index in GATES.get(count, ()):  # a branch adds less than it reads, as in a trained network
                    parameter[index * width : (index + 1) * width] *= 0.3
    for query in matching(r"attn2\.to_q$"):  # it reads the residual stream, and attends to more than one token
        query.weight *= 0.02
    for reader in matching(case.readers):
        reader.weight[:, channels] /= s.view(-1, *[1] * (reader.weight.ndim - 2))
    for makers, readers in case.makers.items():
        for maker in matching(makers):
            maker.weight[channels] *= s.view(-1, *[1] * (maker.weight.ndim - 1))
            if maker.bias is not None:
                maker.bias[channels] *= s
        for reader in matching(readers):
            for channel, stretch in zip(CHANNELS, STRETCH, strict=True):
                wide = makers == VALUES
                reader.weight[:, list(case.shared.get(channel, (channel,)) if wide else (channel,))] /= stretch
