"""FLUX.2 (Black Forest Labs, 2025): packed latents of 16 pixels a cell, positions of four axes, no biases."""

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

# μ = slope · tokens + offset at two numbers of steps, between which it is linear: diffusers' fit.
FEW, MANY = (10, 8.73809524e-05, 1.89833333), (200, 0.00016927, 0.45666666)
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"  # Qwen3's template
LAYERS = (9, 18, 27)  # of Qwen3, whose outputs are a token's channels
WEIGHT = Port("guidance_scale", "condition", "float32", ())  # of dev, whose guidance is embedded
LARGE = 4300  # image tokens above which μ is that of MANY steps, however many there are


class Flux2Velocity(nn.Module):
    """Name the inputs of Flux2Transformer2DModel, whose tokens are the cells of the latents; it gives dx/dσ."""

    def __init__(self, transformer: Any, size: tuple[int, int], tokens: int) -> None:
        super().__init__()
        self.transformer = transformer
        none, (height, width) = torch.zeros(1, dtype=torch.int64), map(torch.arange, size)
        self.register_buffer("image_ids", torch.cartesian_prod(none, height, width, none), persistent=False)
        self.register_buffer("text_ids", torch.cartesian_prod(none, none, none, torch.arange(tokens)), persistent=False)

    def forward(
        self, latents: Tensor, timesteps: Tensor, captions: Tensor, guidance_scale: Tensor | None = None
    ) -> Tensor:
        velocity = self.transformer(
            latents.flatten(2).transpose(1, 2),  # (B, H W, C)
            encoder_hidden_states=captions,
            timestep=timesteps,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            guidance=guidance_scale,
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).unflatten(2, latents.shape[2:])


class Flux2Prompt(nn.Module):
    """captions: the outputs of three of Qwen3's layers, along channels; padding is not masked."""

    def __init__(self, encoders: Mapping[str, Any], transformer: Any, tokens: int) -> None:
        super().__init__()
        if transformer.config.guidance_embeds:
            raise UsageError("the prompts of FLUX.2-dev, by Mistral, are not supported: pass --without-text-encoders")
        self.qwen3 = encoders["text_encoder"].model

    def forward(self, ids: Tensor, ids_mask: Tensor) -> Tensor:
        states = self.qwen3(ids, attention_mask=ids_mask, output_hidden_states=True, use_cache=False).hidden_states
        return torch.cat([states[layer] for layer in LAYERS], dim=-1)


def network(transformer: Any, size: tuple[int, int], tokens: int) -> Network:
    config = transformer.config
    embedded = config.guidance_embeds
    return Network(
        Flux2Velocity(transformer, size, tokens).eval(),
        ports=(
            Port("latents", "state", "float32", (config.in_channels, *size)),
            Port("timesteps", "time", "float32", ()),
            Port("captions", "condition", "float32", (tokens, config.joint_attention_dim)),
            *([WEIGHT] if embedded else []),
        ),
        guidance=4.0,
        guidance_port=WEIGHT.name if embedded else "",
    )


def mu(tokens: int, fields: Mapping[str, float]) -> tuple[float, float]:
    """Return the μ of the scheduler's shift for 0 steps, and what each step adds, by image tokens alone."""
    (few, low), (many, high) = ((steps, slope * tokens + offset) for steps, slope, offset in (FEW, MANY))
    growth = 0.0 if tokens > LARGE else (high - low) / (many - few)
    return high - many * growth, growth


FLUX2 = Family(
    "Flux2Transformer2DModel",
    network,
    tokens={"Flux2KleinPipeline": 512, "Flux2Pipeline": 512},
    scheduler=lambda config: {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
    pixels=16,
    flow_spacing="trailing",
    steps=lambda config: 4 if config.get("distilled") else 50,
    distilled=lambda pipeline, scheduler: bool(pipeline.get("is_distilled")),
    text=Text(Flux2Prompt, prompts=(Tokens("ids", "tokenizer", mask="ids_mask", template=CHAT),), gives=("captions",)),
    mu=mu,
    size=64,
    supported={"patch_size": (1,)},
)
