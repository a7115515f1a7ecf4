"""AuraFlow (Cloneofsimo and the team of fal, 2024): blocks of two streams, then blocks of one, without biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.families.family import Family
from dit_export.networks.text import Text, Tokens
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError


class AuraFlowVelocity(nn.Module):
    """Name the inputs of AuraFlowTransformer2DModel, which reads σ and gives dx/dσ."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Tensor) -> Tensor:
        return self.transformer(latents, timestep=timesteps, encoder_hidden_states=captions, return_dict=False)[0]


class AuraFlowPrompt(nn.Module):
    """captions: UMT5's, with zeros after the prompt."""

    def __init__(self, encoders: Mapping[str, Any], transformer: Any, tokens: int) -> None:
        super().__init__()
        self.umt5 = encoders["text_encoder"]

    def forward(self, ids: Tensor, ids_mask: Tensor) -> Tensor:
        return self.umt5(ids, attention_mask=ids_mask)[0] * ids_mask[..., None]


def network(transformer: Any, size: tuple[int, int], tokens: int) -> Network:
    config = transformer.config
    longest = int(config.pos_embed_max_size**0.5) * config.patch_size
    if max(size) > longest:
        raise UsageError(f"{AURAFLOW.name}: latents of side {max(size)}; its position table ends at {longest}")
    return Network(
        AuraFlowVelocity(transformer).eval(),
        ports=(
            Port("latents", "state", "float32", (config.in_channels, *size)),
            Port("timesteps", "time", "float32", ()),
            Port("captions", "condition", "float32", (tokens, config.joint_attention_dim)),
        ),
        guidance=3.5,
    )


AURAFLOW = Family(
    "AuraFlowTransformer2DModel",
    network,
    tokens={"AuraFlowPipeline": 256},
    scheduler=lambda config: {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.73},
    flow_spacing="linspace",
    steps=lambda config: 50,
    size=128,
    text=Text(AuraFlowPrompt, prompts=(Tokens("ids", "tokenizer", mask="ids_mask"),), gives=("captions",)),
)
