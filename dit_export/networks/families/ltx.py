"""LTX-Video (HaCohen et al., arXiv 2501.00103): a latent cell is 8 frames of 32 x 32 pixels, the first one 1 frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.families.family import Family
from dit_export.networks.text import Text, Tokens
from dit_runtime.bundle.manifest import Port

FRAMES, PIXELS = 8, 32  # of a cell
RATE = 25  # frames a second, as the pipeline has it unless it is asked for others


class LTXVelocity(nn.Module):
    """Name the inputs of LTXVideoTransformer3DModel, whose tokens are cells; it reads 1000 σ and gives dx/dσ."""

    def __init__(self, transformer: Any, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.transformer = transformer
        steps = (FRAMES / RATE, PIXELS, PIXELS)  # seconds and pixels from a cell to the next
        axes = [torch.arange(count, dtype=torch.float32) * step for count, step in zip(size, steps, strict=True)]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        self.register_buffer("coordinates", coordinates[None], persistent=False)  # (1, 3, F H W)

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Tensor, mask: Tensor) -> Tensor:
        velocity = self.transformer(
            latents.flatten(2).transpose(1, 2),  # (B, F H W, C)
            encoder_hidden_states=captions,
            timestep=1000 * timesteps,
            encoder_attention_mask=mask,
            video_coords=self.coordinates,
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).unflatten(2, latents.shape[2:])


class LTXPrompt(nn.Module):
    """captions: T5's, which reads the padding too; mask: the prompt's tokens."""

    def __init__(self, encoders: Mapping[str, Any], transformer: Any, tokens: int) -> None:
        super().__init__()
        self.t5 = encoders["text_encoder"]

    def forward(self, ids: Tensor, ids_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.t5(ids)[0], ids_mask.float()


def network(transformer: Any, size: tuple[int, int, int], tokens: int) -> Network:
    config = transformer.config
    return Network(
        LTXVelocity(transformer, size).eval(),
        ports=(
            Port("latents", "state", "float32", (config.in_channels, *size)),
            Port("timesteps", "time", "float32", ()),
            Port("captions", "condition", "float32", (tokens, config.caption_channels)),
            Port("mask", "condition", "float32", (tokens,), masks="captions"),
        ),
        guidance=3.0,
    )


LTX = Family(
    "LTXVideoTransformer3DModel",
    network,
    tokens={"LTXPipeline": 128},
    scheduler=lambda config: {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": True,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "shift_terminal": 0.1,
    },
    flow_spacing="trailing",
    steps=lambda config: 50,
    pixels=PIXELS,
    frames=FRAMES,
    shared=1,  # the norm before the first scale is one op with it
    video=(21, 16, 22),  # 161 frames of 512 x 704 pixels
    text=Text(LTXPrompt, prompts=(Tokens("ids", "tokenizer", mask="ids_mask"),), gives=("captions", "mask")),
    supported={"patch_size": (1,), "patch_size_t": (1,)},
)
