"""Hunyuan-DiT (Li et al., arXiv 2405.08748): a noise schedule, two text encoders, and skips between the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import HunyuanDiTAttentionPool, get_2d_rotary_pos_embed
from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.families.family import Family
from dit_export.networks.text import Text, Tokens
from dit_export.recipe import PIXELS
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError

BERT_TOKENS, T5_TOKENS = 77, 256  # the pipeline's, whatever the prompt
ORIGINAL = (1024, 1024)  # the pipeline's original_size
BASE = 512 // PIXELS  # positions span the latents of 512 px, at every size
Corner = tuple[int, ...]


class Pool(nn.Module):
    """Attend from the mean of the captions to them, by running the layers whose weights diffusers' pool only reads."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, captions: Tensor) -> Tensor:
        pool = self.pool
        tokens = torch.cat([captions.mean(dim=1, keepdim=True), captions], dim=1) + pool.positional_embedding
        query, key, value = (
            linear(part).unflatten(2, (pool.num_heads, -1)).transpose(1, 2)
            for linear, part in ((pool.q_proj, tokens[:, :1]), (pool.k_proj, tokens), (pool.v_proj, tokens))
        )
        return pool.c_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(1))


def span(grid: tuple[int, int], side: int) -> tuple[Corner, Corner]:
    """Return the first and the last corner of the positions of a grid, which fits into a square and is centred."""
    sides = [round(side / max(grid) * count) for count in grid]
    first = tuple(round((side - own) / 2) for own in sides)
    return first, tuple(start + own for start, own in zip(first, sides, strict=True))


class HunyuanDiTNoise(nn.Module):
    """Name the inputs of HunyuanDiT2DModel; the style, the sizes and the positions of the image are constants."""

    sizes: Tensor
    style: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, transformer: Any, size: tuple[int, int]) -> None:
        super().__init__()
        self.transformer = transformer
        if isinstance(transformer.time_extra_emb.pooler, HunyuanDiTAttentionPool):
            transformer.time_extra_emb.pooler = Pool(transformer.time_extra_emb.pooler)
        patch = transformer.config.patch_size
        grid = size[0] // patch, size[1] // patch
        corners = span(grid, BASE // patch)
        cos, sin = get_2d_rotary_pos_embed(transformer.inner_dim // transformer.num_heads, corners, grid)
        pixels = (PIXELS * size[0], PIXELS * size[1])
        self.register_buffer("sizes", torch.tensor([[*ORIGINAL, *pixels, 0, 0]]).float(), persistent=False)
        self.register_buffer("style", torch.zeros(1, dtype=torch.long), persistent=False)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, latents: Tensor, timesteps: Tensor, captions: Tensor, mask: Tensor, captions_2: Tensor, mask_2: Tensor
    ) -> Tensor:
        rows = timesteps.shape[0]
        return self.transformer(
            latents,
            timesteps,
            encoder_hidden_states=captions,
            text_embedding_mask=mask,
            encoder_hidden_states_t5=captions_2,
            text_embedding_mask_t5=mask_2,
            image_meta_size=self.sizes.repeat(rows, 1),
            style=self.style.repeat(rows),
            image_rotary_emb=(self.cos, self.sin),
            return_dict=False,
        )[0]


class HunyuanDiTPrompt(nn.Module):
    """captions and mask: BERT's; captions_2 and mask_2: mT5's, padding with the rest, which the pool reads."""

    def __init__(self, encoders: Mapping[str, Any], transformer: Any, tokens: int) -> None:
        super().__init__()
        self.bert, self.t5 = encoders["text_encoder"], encoders["text_encoder_2"]

    def forward(self, ids: Tensor, ids_mask: Tensor, ids_2: Tensor, ids_2_mask: Tensor) -> tuple[Tensor, ...]:
        captions = self.bert(ids, attention_mask=ids_mask)[0]
        captions_2 = self.t5(ids_2, attention_mask=ids_2_mask)[0]
        return captions, ids_mask.float(), captions_2, ids_2_mask.float()


def scheduler(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the published schedule: from version 1.2 on, which reads neither sizes nor a style, it ends lower."""
    beta_end = 0.03 if config["use_style_cond_and_image_meta_size"] else 0.018
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": beta_end, "steps_offset": 1}
    fields = {"prediction_type": "v_prediction", "variance_type": "fixed_small", "clip_sample": False}
    return {"_class_name": "DDPMScheduler"} | betas | fields


def network(transformer: Any, size: tuple[int, int], tokens: int) -> Network:
    config = transformer.config
    own = config.text_len + config.text_len_t5
    if tokens != own:
        raise UsageError(f"caption-tokens {tokens}: {HUNYUAN_DIT.name} has tables for {own} tokens")
    return Network(
        HunyuanDiTNoise(transformer, size).eval(),
        ports=(
            Port("latents", "state", "float32", (config.in_channels, *size)),
            Port("timesteps", "time", "float32", ()),
            Port("captions", "condition", "float32", (config.text_len, config.cross_attention_dim)),
            Port("mask", "condition", "float32", (config.text_len,), masks="captions"),
            Port("captions_2", "condition", "float32", (config.text_len_t5, config.cross_attention_dim_t5)),
            Port("mask_2", "condition", "float32", (config.text_len_t5,), masks="captions_2"),
        ),
        guidance=5.0,
    )


HUNYUAN_DIT = Family(
    "HunyuanDiT2DModel",
    network,
    tokens={"HunyuanDiTPipeline": BERT_TOKENS + T5_TOKENS},
    scheduler=scheduler,
    steps=lambda config: 50,
    text=Text(
        HunyuanDiTPrompt,
        prompts=(
            Tokens("ids", "tokenizer", BERT_TOKENS, mask="ids_mask"),
            Tokens("ids_2", "tokenizer_2", T5_TOKENS, mask="ids_2_mask"),
        ),
        gives=("captions", "mask", "captions_2", "mask_2"),
    ),
)
