"""Chroma (lodestone-rock, 2025): FLUX.1 with all modulations from one small network, and with true guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_chroma import ChromaCombinedTimestepTextProjEmbeddings
from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.families.family import Family
from dit_export.networks.families.packing import PATCH, pack, positions, unpack
from dit_export.networks.text import Text, Tokens
from dit_runtime.bundle.manifest import Port


class Embedding(nn.Module):
    """Embed the time as diffusers does, for any number of rows: its own makes a list of them, which fixes a trace."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, timestep: Tensor) -> Tensor:
        table = self.embedding.mod_proj  # a row for each vector
        time, zero = self.embedding.time_proj(timestep), self.embedding.guidance_proj(torch.zeros_like(timestep))
        each = torch.cat([time, zero], dim=1)[:, None].expand(-1, table.shape[0], -1)
        return torch.cat([each, table.expand(timestep.shape[0], -1, -1)], dim=-1)


class ChromaVelocity(nn.Module):
    """Name the inputs of ChromaTransformer2DModel, which reads packed latents and σ as its pipeline rounds it.

    Its mask is added to the scores: a pair of tokens that both count has 1 more than any other.
    """

    def __init__(self, transformer: Any, size: tuple[int, int], tokens: int) -> None:
        super().__init__()
        self.transformer, self.size = transformer, size
        self.count = size[0] * size[1] // PATCH**2  # tokens of an image
        if isinstance(transformer.time_text_embed, ChromaCombinedTimestepTextProjEmbeddings):
            transformer.time_text_embed = Embedding(transformer.time_text_embed)
        self.register_buffer("image_ids", positions(size), persistent=False)
        self.register_buffer("text_ids", torch.zeros(tokens, 3), persistent=False)

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Tensor, mask: Tensor) -> Tensor:
        velocity = self.transformer(
            hidden_states=pack(latents),
            timestep=1000 * timesteps / 1000,
            encoder_hidden_states=captions,
            attention_mask=F.pad(mask, (0, self.count), value=1.0),
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]
        return unpack(velocity, self.size)


class ChromaPrompt(nn.Module):
    """captions: T5's last layer; mask: 1 for each token of the prompt and the first one after it."""

    def __init__(self, encoders: Mapping[str, Any], transformer: Any, tokens: int) -> None:
        super().__init__()
        self.t5, self.tokens = encoders["text_encoder"], tokens

    def forward(self, ids: Tensor, ids_mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.arange(self.tokens) <= ids_mask.sum(dim=1, keepdim=True)
        return self.t5(ids, attention_mask=ids_mask)[0], mask.float()


def network(transformer: Any, size: tuple[int, int], tokens: int) -> Network:
    config = transformer.config
    return Network(
        ChromaVelocity(transformer, size, tokens).eval(),
        ports=(
            Port("latents", "state", "float32", (config.in_channels // PATCH**2, *size)),
            Port("timesteps", "time", "float32", ()),
            Port("captions", "condition", "float32", (tokens, config.joint_attention_dim)),
            Port("mask", "condition", "float32", (tokens,), masks="captions"),
        ),
        guidance=5.0,
    )


CHROMA = Family(
    "ChromaTransformer2DModel",
    network,
    tokens={"ChromaPipeline": 512},
    scheduler=lambda config: {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
    flow_spacing="trailing",
    steps=lambda config: 35,
    size=128,
    patch=PATCH,
    text=Text(ChromaPrompt, prompts=(Tokens("ids", "tokenizer", mask="ids_mask"),), gives=("captions", "mask")),
    supported={"patch_size": (1,)},
)
