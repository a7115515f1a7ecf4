"""PixArt-alpha and PixArt-Sigma (Chen et al., arXiv 2310.00426, 2403.04692): captions in a cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.families.family import Family
from dit_export.networks.text import Text, Tokens
from dit_runtime.bundle.manifest import Port


class PixArtNoise(nn.Module):
    """Name the inputs of PixArtTransformer2DModel; the size and aspect ratio of the images are constants."""

    def __init__(self, transformer: Any, size: tuple[int, int]) -> None:
        super().__init__()
        self.transformer = transformer
        self.pixels = [8.0 * side for side in size]

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Tensor, mask: Tensor) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.transformer.use_additional_conditions:
            height, width = self.pixels
            added["resolution"] = torch.tensor([[height, width]]).expand(timesteps.shape[0], -1)
            added["aspect_ratio"] = torch.tensor([[height / width]]).expand(timesteps.shape[0], -1)
        return self.transformer(
            latents,
            timestep=timesteps,
            encoder_hidden_states=captions,
            encoder_attention_mask=mask,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


class PixArtPrompt(nn.Module):
    """captions and mask: T5's, of the prompt in small letters."""

    def __init__(self, encoders: Mapping[str, Any], transformer: Any, tokens: int) -> None:
        super().__init__()
        self.t5 = encoders["text_encoder"]

    def forward(self, ids: Tensor, ids_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.t5(ids, attention_mask=ids_mask)[0], ids_mask.float()


def network(transformer: Any, size: tuple[int, int], tokens: int) -> Network:
    config = transformer.config
    channels = config.caption_channels or config.cross_attention_dim
    return Network(
        PixArtNoise(transformer, size).eval(),
        ports=(
            Port("latents", "state", "float32", (config.in_channels, *size)),
            Port("timesteps", "time", "float32", ()),
            Port("captions", "condition", "float32", (tokens, channels)),
            Port("mask", "condition", "float32", (tokens,), masks="captions"),
        ),
        guidance=4.5,
    )


PIXART = Family(
    "PixArtTransformer2DModel",
    network,
    tokens={"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300},
    steps=lambda config: 20,
    text=Text(
        PixArtPrompt,
        prompts=(Tokens("ids", "tokenizer", mask="ids_mask", lowercase=True),),
        gives=("captions", "mask"),
    ),
    supported={"attention_type": ("default",)},
)
