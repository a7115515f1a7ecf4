"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): text and image tokens in one joint attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.families.family import Family
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError


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
    tokens={"StableDiffusion3Pipeline": 77 + 256},  # CLIP's, then T5's
    scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    flow_spacing="linspace",
    steps=lambda config: 28,
    gains=3,  # 4 with the attention's; the last text stream has 1 instead of 2, and the head 1
)
