"""CogView4 (Z.ai, 2025): text and image tokens in one joint attention, with positions of the image alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.families.family import Family
from dit_export.networks.text import Text, Tokens
from dit_export.recipe import PIXELS
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError

FILLED = 16  # a prompt is filled up to a multiple of so many tokens


class MaskedAttention:
    """Attend to the image and a prompt's own tokens: diffusers' processor adds its mask to the scores, as 0 or 1."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], 1)
        query, key, value = (
            linear(joint).unflatten(2, (attn.heads, -1)).transpose(1, 2) for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (self.rotate(part, text, image_rotary_emb) for part in (attn.norm_q(query), attn.norm_k(key)))
        mask = F.pad(attention_mask, (0, hidden_states.shape[1]), value=True)[:, None, None]
        joint = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
        joint = attn.to_out[0](joint)
        return joint[:, text:], joint[:, :text]

    @staticmethod
    def rotate(heads: Tensor, text: int, factors: tuple[Tensor, Tensor]) -> Tensor:
        image = apply_rotary_emb(heads[:, :, text:], factors, use_real_unbind_dim=-2)
        return torch.cat([heads[:, :, :text], image], 2)


class CogView4Velocity(nn.Module):
    """Name the inputs of CogView4Transformer2DModel, which reads 1000 σ before its shift and gives dx/dσ.

    The picture is stated to be whole, and of its own size.
    """

    sides: Tensor

    def __init__(self, transformer: Any, size: tuple[int, int]) -> None:
        super().__init__()
        self.transformer = transformer
        for block in transformer.transformer_blocks:
            block.attn1.set_processor(MaskedAttention())
        self.register_buffer("sides", PIXELS * torch.tensor([size], dtype=torch.float32), persistent=False)

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Tensor, mask: Tensor) -> Tensor:
        return self.transformer(
            latents,
            encoder_hidden_states=captions,
            timestep=1000 * timesteps,
            original_size=self.sides,
            target_size=self.sides,
            crop_coords=torch.zeros_like(self.sides),
            attention_mask=mask > 0.5,
            return_dict=False,
        )[0]


class CogView4Prompt(nn.Module):
    """Return the hidden states before GLM's last layer, and the mask of a prompt's tokens.

    Padding stands before the prompt, up to a multiple of 16 tokens, and counts. The pipeline fills prompts of one call
    up to the longest of them; here each prompt is filled up as in a call of its own.
    """

    def __init__(self, encoders: Mapping[str, Any], transformer: Any, tokens: int) -> None:
        super().__init__()
        self.language, self.padding = encoders["text_encoder"], encoders["tokenizer"].pad_token_id

    def forward(self, ids: Tensor, ids_mask: Tensor) -> tuple[Tensor, Tensor]:
        count = ids_mask.sum(1, keepdim=True)
        filled = (count + FILLED - 1) // FILLED * FILLED
        place = torch.arange(ids.shape[1]) - (filled - count)  # of each token in the prompt
        moved = torch.where(place < 0, self.padding, ids.gather(1, place.clamp_min(0)))
        states = self.language(moved, output_hidden_states=True, use_cache=False).hidden_states  # causal
        return states[-2], (torch.arange(ids.shape[1]) < filled).float()


def network(transformer: Any, size: tuple[int, int], tokens: int) -> Network:
    config = transformer.config
    if tokens % FILLED:
        raise UsageError(f"{COGVIEW4.name}: captions of {tokens} tokens; expected a multiple of {FILLED}")
    return Network(
        CogView4Velocity(transformer, size).eval(),
        ports=(
            Port("latents", "state", "float32", (config.in_channels, *size)),
            Port("timesteps", "time", "float32", ()),
            Port("captions", "condition", "float32", (tokens, config.text_embed_dim)),
            Port("mask", "condition", "float32", (tokens,), masks="captions"),
        ),
        guidance=5.0,
    )


def mu(tokens: int, fields: Mapping[str, float]) -> tuple[float, float]:
    """Return the pipeline's μ, which is linear in the side of the image, whatever the number of steps."""
    return (tokens / fields["base_image_seq_len"]) ** 0.5 * fields["max_shift"] + fields["base_shift"], 0.0


COGVIEW4 = Family(
    "CogView4Transformer2DModel",
    network,
    tokens={"CogView4Pipeline": 1024},
    scheduler=lambda config: {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": True,
        "time_shift_type": "linear",
        "base_shift": 0.25,
        "max_shift": 0.75,
    },
    flow_spacing="integer",
    mu=mu,
    steps=lambda config: 50,
    text=Text(
        CogView4Prompt,
        prompts=(Tokens("ids", "tokenizer", mask="ids_mask", side="right"),),
        gives=("captions", "mask"),
    ),
    gains=3,  # 4 with the attention's; the last text stream has 1 instead of 2, and the head 1
)
