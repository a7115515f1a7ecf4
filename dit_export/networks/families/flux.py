"""FLUX.1 (Black Forest Labs, 2024): dev has the weight of guidance as an input, schnell runs without guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.families.family import Family
from dit_export.networks.families.packing import PATCH, pack, positions, unpack
from dit_export.networks.text import Text, Tokens
from dit_runtime.bundle.manifest import Port

CLIP_TOKENS = 77
WEIGHT = Port("guidance_scale", "condition", "float32", ())


class FluxVelocity(nn.Module):
    """Name the inputs of FluxTransformer2DModel, which reads packed latents and σ as its pipeline rounds it."""

    def __init__(self, transformer: Any, size: tuple[int, int], tokens: int) -> None:
        super().__init__()
        self.transformer, self.size = transformer, size
        self.register_buffer("image_ids", positions(size), persistent=False)
        self.register_buffer("text_ids", torch.zeros(tokens, 3), persistent=False)

    def forward(
        self, latents: Tensor, timesteps: Tensor, captions: Tensor, pooled: Tensor, guidance_scale: Tensor | None = None
    ) -> Tensor:
        velocity = self.transformer(
            hidden_states=pack(latents),
            timestep=1000 * timesteps / 1000,
            guidance=guidance_scale,
            pooled_projections=pooled,
            encoder_hidden_states=captions,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]
        return unpack(velocity, self.size)


class FluxPrompt(nn.Module):
    """captions: T5's last layer, padding with the rest; pooled: that of CLIP, which alone sees its prompt."""

    def __init__(self, encoders: Mapping[str, Any], transformer: Any, tokens: int) -> None:
        super().__init__()
        self.clip, self.t5 = encoders["text_encoder"], encoders["text_encoder_2"]

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        return self.t5(ids_2)[0], self.clip(ids).pooler_output


def network(transformer: Any, size: tuple[int, int], tokens: int) -> Network:
    config = transformer.config
    embedded = config.guidance_embeds
    return Network(
        FluxVelocity(transformer, size, tokens).eval(),
        ports=(
            Port("latents", "state", "float32", (config.in_channels // PATCH**2, *size)),
            Port("timesteps", "time", "float32", ()),
            Port("captions", "condition", "float32", (tokens, config.joint_attention_dim)),
            Port("pooled", "condition", "float32", (config.pooled_projection_dim,)),
            *[WEIGHT] * embedded,
        ),
        guidance=3.5 if embedded else 1.0,
        guidance_port=WEIGHT.name if embedded else "",
    )


FLUX = Family(
    "FluxTransformer2DModel",
    network,
    tokens={"FluxPipeline": 512},
    scheduler=lambda config: {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": config["guidance_embeds"],
    },
    flow_spacing="trailing",
    steps=lambda config: 28 if config["guidance_embeds"] else 4,
    size=128,
    patch=PATCH,
    text=Text(
        FluxPrompt,
        prompts=(Tokens("ids", "tokenizer", CLIP_TOKENS), Tokens("ids_2", "tokenizer_2")),
        gives=("captions", "pooled"),
    ),
    supported={"patch_size": (1,)},
)
