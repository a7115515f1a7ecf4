"""The skeleton of a family: copy it to dit_export/networks/families/NAME.py, and name it in `__init__.py` there.

It fits a flow with one text encoder and a mask. "Add a family" in ARCHITECTURE.md has the other cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.families.family import Family
from dit_export.networks.text import Text, Tokens
from dit_runtime.bundle.manifest import Port


class MyVelocity(nn.Module):
    """Name the inputs of MyTransformer2DModel, which reads 1000 σ and gives dx/dσ."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer  # constants of the pipeline's call become buffers here

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Tensor, mask: Tensor) -> Tensor:  # the ports
        return self.transformer(
            latents,
            timestep=1000 * timesteps,  # a flow's timesteps are σ
            encoder_hidden_states=captions,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]


class MyPrompt(nn.Module):
    """captions and mask: T5's."""

    def __init__(self, encoders: Mapping[str, Any], transformer: Any, tokens: int) -> None:
        super().__init__()
        self.t5 = encoders["text_encoder"]  # the pipeline's folder

    def forward(self, ids: Tensor, ids_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.t5(ids, attention_mask=ids_mask)[0], ids_mask.float()


def network(transformer: Any, size: tuple[int, int], tokens: int) -> Network:
    config = transformer.config
    return Network(
        MyVelocity(transformer).eval(),
        ports=(
            Port("latents", "state", "float32", (config.in_channels, *size)),
            Port("timesteps", "time", "float32", ()),
            Port("captions", "condition", "float32", (tokens, config.caption_channels)),
            Port("mask", "condition", "float32", (tokens,), masks="captions"),
        ),
        guidance=4.5,  # the pipeline's default
    )


MINE = Family(
    "MyTransformer2DModel",
    network,
    tokens={"MyPipeline": 300},
    pixels=32,  # leave it out for a VAE of 8 pixels a cell
    flow_spacing="linspace",  # the σ that the pipeline passes to set_timesteps
    text=Text(MyPrompt, prompts=(Tokens("ids", "tokenizer", mask="ids_mask"),), gives=("captions", "mask")),
)
