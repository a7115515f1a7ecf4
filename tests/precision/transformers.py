"""Tiny transformers of diffusers that make every kind of layer, with channels that stand out where layers read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from dit_export.networks import Network
from dit_export.networks.families import family_network
from tests.networks import tiny

CHANNELS, STRETCH = (5, 23, 41), (8.0, 14.0, 20.0)  # which stand out, and by how much
NORMS = (  # linears that make shifts and scales
    r"(norm1?(_context)?|modulation(_img|_txt)?|time_embed|adaln_single)\.linear$"
    r"|_mod\.1$|adaLN_modulation\.0$"
)
MODULATED = {  # these, of as many vectors as a linear makes
    12: (0, 1, 2, 3, 6, 7, 8, 9),
    9: (0, 1, 3, 4, 6, 7),
    6: (0, 1, 3, 4),
    4: (0, 2),
    3: (0, 1),
    2: (0, 1),
    1: (0,),
}
GATES = {12: (4, 5, 10, 11), 9: (2, 5, 8), 6: (2, 5), 4: (1, 3), 3: (2,), 2: (), 1: ()}


class Makes(NamedTuple):
    """A module that makes channels, the one that reads them, and which of its inputs they are where they are others."""

    maker: str
    reader: str
    offset: int = 0  # of the maker's channels
    shared: Mapping[int, Sequence[int]] = {}


class Case(NamedTuple):
    network: Callable[[], Network]
    readers: str  # of modulated norms; "": their channels do not stand out
    makes: tuple[Makes, ...]


JOINT = r"\.(to_[qkv]|add_[qkv]_proj)$"
VALUES, OUT = r"\.(to_v|add_v_proj)$", r"\.(to_out\.0|to_add_out)$"
HEADS = {5: (5, 29), 23: (23, 47), 41: (65, 89)}  # channels of 4 heads of 24, two and two with the same values
CASES = {
    "FLUX.1": Case(
        lambda: family_network(tiny.flux(num_layers=1, in_channels=16), (8, 8), tiny.TOKENS),
        JOINT + r"|net\.0\.proj$|proj_mlp$",
        (Makes(VALUES, OUT + r"|blocks.*proj_out$"),),
    ),
    "FLUX.2": Case(
        lambda: family_network(tiny.flux2(), (4, 4), tiny.TOKENS),
        JOINT + r"|\.linear_in$|mlp_proj$",
        (Makes(VALUES, OUT), Makes(r"\.linear_in$", r"\.linear_out$", 192)),
    ),
    "AuraFlow": Case(
        lambda: family_network(tiny.auraflow(num_mmdit_layers=1), (8, 8), tiny.TOKENS),
        JOINT + r"|blocks.*\.linear_[12]$",
        (Makes(VALUES, OUT), Makes(r"blocks.*\.linear_2$", r"out_projection$")),
    ),
    "Sana": Case(
        lambda: family_network(tiny.sana(num_layers=1), (4, 4), tiny.TOKENS),
        r"attn1\.to_[qkv]$|conv_inverted$",
        (Makes(VALUES, OUT), Makes(r"conv_depth$", r"conv_point$")),
    ),
    "Lumina 2": Case(
        lambda: family_network(tiny.lumina2(num_layers=1), (8, 8), tiny.TOKENS),
        JOINT + r"|feed_forward\.linear_[13]$",
        (Makes(VALUES, OUT, shared=HEADS), Makes(r"\.linear_3$", r"feed_forward\.linear_2$")),
    ),
    "SD3.5": Case(
        lambda: family_network(tiny.sd3(**tiny.SD3_5), (8, 8), tiny.TOKENS),
        JOINT + r"|net\.0\.proj$",
        (Makes(VALUES, OUT),),
    ),
    "Chroma": Case(
        lambda: family_network(tiny.chroma(), (8, 8), tiny.TOKENS),
        "",  # one linear makes shifts, scales and gates
        (Makes(VALUES, OUT + r"|blocks.*proj_out$"),),
    ),
    "PixArt": Case(
        lambda: family_network(tiny.pixart(), (8, 8), tiny.TOKENS),
        r"attn1\.to_[qkv]$|net\.0\.proj$",
        (Makes(VALUES, OUT),),
    ),
    "LTX-Video": Case(
        lambda: family_network(tiny.ltx(), (2, 4, 4), tiny.TOKENS),
        r"attn1\.to_[qkv]$|net\.0\.proj$",
        (Makes(VALUES, OUT),),
    ),
    "Qwen-Image": Case(
        lambda: family_network(tiny.qwen_image(num_layers=3), (8, 8), tiny.TOKENS),
        JOINT + r"|net\.0\.proj$",
        (Makes(VALUES, OUT),),
    ),
    "Z-Image": Case(
        lambda: family_network(tiny.z_image(), (8, 8), 32),
        r"attention\.to_[qkv]$|feed_forward\.w[13]$",
        (Makes(VALUES, OUT), Makes(r"\.w3$", r"\.w2$")),
    ),
    "CogView4": Case(
        lambda: family_network(tiny.cogview4(), (8, 8), 16),
        JOINT + r"|net\.0\.proj$",
        (Makes(VALUES, OUT),),
    ),
    "Hunyuan-DiT": Case(
        lambda: family_network(tiny.hunyuan_dit(), (8, 8), 32),
        r"attn1\.to_[qkv]$",
        (Makes(VALUES, OUT),),
    ),
}


def network(name: str) -> Network:
    """Return a network of random weights with outlying channels."""
    made = CASES[name].network()
    _plant(made.module, CASES[name])
    return made


@torch.no_grad()
def _plant(module: nn.Module, case: Case) -> None:
    modules = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    channels, s = torch.tensor(CHANNELS), torch.tensor(STRETCH)

    def matching(pattern: str) -> list[Any]:
        layers = [module for name, module in modules.items() if re.search(pattern, name)]
        assert layers, pattern
        return layers

    for linear in matching(NORMS) if case.readers else ():
        width = linear.in_features
        count = linear.out_features // width
        rows = torch.cat([index * width + channels for index in MODULATED[count]])
        for parameter in filter(lambda own: own is not None, (linear.weight, linear.bias)):
            parameter[rows] *= s.repeat(len(MODULATED[count])).view(-1, *[1] * (parameter.ndim - 1))
            for index in GATES[count]:  # a branch adds less than it reads, as in a trained network
                parameter[index * width : (index + 1) * width] *= 0.3
    for name in [name for name in modules if name.endswith("distilled_guidance_layer.out_proj")]:
        modules[name].weight *= 0.3  # gates among them, as above
        modules[name].bias *= 0.3
    for name in [name for name in modules if name.endswith("attn2.to_q")]:
        modules[name].weight *= 0.02  # it reads the residual stream, and attends to more than one token
    for reader in matching(case.readers) if case.readers else ():
        reader.weight[:, channels] /= s.view(-1, *[1] * (reader.weight.ndim - 2))
    for makes in case.makes:
        for maker in matching(makes.maker):
            for parameter in filter(lambda own: own is not None, (maker.weight, maker.bias)):
                parameter[makes.offset + channels] *= s.view(-1, *[1] * (parameter.ndim - 1))
        for reader in matching(makes.reader):
            for channel, stretch in zip(CHANNELS, STRETCH, strict=True):
                reader.weight[:, list(makes.shared.get(channel, (channel,)))] /= stretch
