"""Lumina-Image 2.0 (Qin et al., arXiv 2503.21758): prompt and image in one sequence, the image after the prompt."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.families.encoders import SecondLastLayer
from dit_export.networks.families.family import Family
from dit_export.networks.families.positions import Positions, pack, unpack
from dit_export.networks.rules import LEAST, Linear
from dit_export.networks.text import Text, Tokens
from dit_runtime.bundle.manifest import Port

SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)


class Lumina2Velocity(nn.Module):
    """Run the layers of Lumina2Transformer2DModel, which read 1 - σ and give -dx/dσ, with a mask of prompts."""

    def __init__(self, transformer: Any, size: tuple[int, int], tokens: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.size, self.patch = size, transformer.config.patch_size
        height, width = (side // self.patch for side in size)
        self.positions = Positions(transformer.rope_embedder.freqs_cis, torch.arange(tokens), (height, width))

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Tensor, mask: Tensor) -> Tensor:
        model = self.transformer
        time, text = model.time_caption_embed(latents, 1 - timesteps, captions)
        positions = self.positions(mask.sum(1).long())
        for_text, for_image = (torch.view_as_complex(part) for part in positions)
        for layer in model.context_refiner:
            text = layer(text, mask > 0.5, for_text)
        image = model.x_embedder(pack(latents, self.patch))
        for layer in model.noise_refiner:
            image = layer(image, None, for_image, time)
        joint, for_joint = torch.cat([text, image], 1), torch.view_as_complex(torch.cat(positions, 1))
        present = F.pad(mask > 0.5, (0, image.shape[1]), value=True)
        for layer in model.layers:
            joint = layer(joint, present, for_joint, time)
        velocity = model.norm_out(joint, time)[:, captions.shape[1] :]
        return -unpack(velocity, self.size, self.patch)


class RowsRenormalized(Linear):
    """Linear guidance after which each row of each channel has the norm of its conditional prediction again."""

    def forward(self, conditional: Tensor, negative: Tensor, weight: Tensor) -> Tensor:
        guided = super().forward(conditional, negative, weight)
        own, new = (torch.linalg.vector_norm(rows, dim=-1, keepdim=True) for rows in (conditional, guided))
        return guided * (own / new.clamp_min(LEAST))


def network(transformer: Any, size: tuple[int, int], tokens: int) -> Network:
    config = transformer.config
    return Network(
        Lumina2Velocity(transformer, size, tokens).eval(),
        ports=(
            Port("latents", "state", "float32", (config.in_channels, *size)),
            Port("timesteps", "time", "float32", ()),
            Port("captions", "condition", "float32", (tokens, config.cap_feat_dim)),
            Port("mask", "condition", "float32", (tokens,), masks="captions"),
        ),
        rule=RowsRenormalized(),
    )


LUMINA2 = Family(
    "Lumina2Transformer2DModel",
    network,
    tokens={"Lumina2Pipeline": 256},
    scheduler=lambda config: {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0},
    flow_spacing="trailing",
    steps=lambda config: 30,
    text=Text(
        SecondLastLayer,
        prompts=(Tokens("ids", "tokenizer", mask="ids_mask", template=SYSTEM + "{}", negative="{}", side="right"),),
        gives=("captions", "mask"),
    ),
    ahead=("context_refiner",),
    shift_tokens=lambda network: network.state.shape[0],  # the pipeline takes the channels for the tokens
)
