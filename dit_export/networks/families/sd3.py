"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): text and image tokens in one joint attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.families.family import Family
from dit_export.networks.text import Text, Tokens
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError

CLIP_TOKENS = 77


class SD3Velocity(nn.Module):
    """Name the inputs of SD3Transformer2DModel, which reads 1000 σ and gives dx/dσ."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Tensor, pooled: Tensor) -> Tensor:
        return self.transformer(
            hidden_states=latents,
            timestep=1000 * timesteps,
            encoder_hidden_states=captions,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


class SD3Prompt(nn.Module):
    """captions: [CLIP-L, CLIP-G, 0] along channels, then T5 along tokens; pooled: CLIP's projections of the last token.

    A pipeline without T5 has zeros in its place.
    """

    def __init__(self, encoders: Mapping[str, Any], transformer: Any, tokens: int) -> None:
        super().__init__()
        self.clips = nn.ModuleList([encoders["text_encoder"], encoders["text_encoder_2"]])
        self.t5 = encoders.get("text_encoder_3")
        self.shape = tokens - CLIP_TOKENS, transformer.config.joint_attention_dim

    def forward(self, ids: Tensor, ids_2: Tensor, ids_3: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = [clip(own, output_hidden_states=True) for clip, own in zip(self.clips, (ids, ids_2), strict=True)]
        short = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)  # (B, 77, C)
        long = short.new_zeros(ids.shape[0], *self.shape) if self.t5 is None else self.t5(ids_3)[0]
        short = nn.functional.pad(short, (0, long.shape[-1] - short.shape[-1]))
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return torch.cat([short, long], dim=1), pooled


def network(transformer: Any, size: tuple[int, int], tokens: int) -> Network:
    config = transformer.config
    longest = config.pos_embed_max_size * config.patch_size
    if max(size) > longest:
        raise UsageError(f"{SD3.name}: latents of side {max(size)}; its position table ends at {longest}")
    return Network(
        SD3Velocity(transformer).eval(),
        ports=(
            Port("latents", "state", "float32", (config.in_channels, *size)),
            Port("timesteps", "time", "float32", ()),
            Port("captions", "condition", "float32", (tokens, config.joint_attention_dim)),
            Port("pooled", "condition", "float32", (config.pooled_projection_dim,)),
        ),
        guidance=7.0,
    )


SD3 = Family(
    "SD3Transformer2DModel",
    network,
    tokens={"StableDiffusion3Pipeline": CLIP_TOKENS + 256},  # CLIP's, then T5's
    scheduler=lambda config: {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    flow_spacing="linspace",
    steps=lambda config: 28,
    text=Text(
        SD3Prompt,
        prompts=(
            Tokens("ids", "tokenizer", CLIP_TOKENS),
            Tokens("ids_2", "tokenizer_2", CLIP_TOKENS),
            Tokens("ids_3", "tokenizer_3", extra=-CLIP_TOKENS),
        ),
        gives=("captions", "pooled"),
    ),
    gains=3,  # 4 with the attention's; the last text stream has 1 instead of 2, and the head 1
)
