"""Sana (Xie et al., arXiv 2410.10629) and Sana-Sprint (arXiv 2503.09641), a consistency network with embedded guidance.

Attention is linear, a latent is 32 pixels wide, and captions are Gemma 2's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.families.family import Family
from dit_export.networks.text import Text, Tokens
from dit_runtime.bundle.manifest import Port

WEIGHT = Port("guidance_scale", "condition", "float32", ())


class SanaVelocity(nn.Module):
    """Name the inputs of SanaTransformer2DModel, which reads 1000 σ, or σ with embedded guidance, and gives dx/dσ."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        config = transformer.config
        self.span = 1 if config.guidance_embeds else 1000 * config.timestep_scale
        self.unit = config.guidance_embeds_scale

    def forward(
        self, latents: Tensor, timesteps: Tensor, captions: Tensor, mask: Tensor, guidance_scale: Tensor | None = None
    ) -> Tensor:
        return self.transformer(
            latents,
            encoder_hidden_states=captions,
            timestep=self.span * timesteps,
            guidance=None if guidance_scale is None else self.unit * guidance_scale,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]


class SanaPrompt(nn.Module):
    """captions and mask: Gemma's, of the first token and of the last ones after the instruction.

    A negative prompt has no instruction: its captions are of the first tokens.
    """

    def __init__(self, encoders: Mapping[str, Any], transformer: Any, tokens: int) -> None:
        super().__init__()
        self.gemma = encoders["text_encoder"]
        start = encoders["tokenizer"].encode(instruction())[:-EXTRA]  # the prompt may change the last ones
        self.register_buffer("start", torch.tensor(start), persistent=False)
        self.tokens, self.started = tokens, len(start)

    def forward(self, ids: Tensor, ids_mask: Tensor) -> tuple[Tensor, Tensor]:
        captions = self.gemma(ids, attention_mask=ids_mask)[0]
        instructed = (ids[:, : self.started] == self.get_buffer("start")).all(1)
        return self.choose(instructed[:, None, None], captions), self.choose(instructed[:, None], ids_mask.float())

    def choose(self, instructed: Tensor, rows: Tensor) -> Tensor:
        last = rows[:, rows.shape[1] - self.tokens + 1 :]
        return torch.where(instructed, torch.cat([rows[:, :1], last], 1), rows[:, : self.tokens])


EXTRA = 2  # tokens of the instruction that its pipeline counts to the prompt


def instruction() -> str:
    """Return what diffusers' pipeline writes before a prompt."""
    from diffusers import SanaPipeline  # imports transformers

    return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


def network(transformer: Any, size: tuple[int, int], tokens: int) -> Network:
    config = transformer.config
    return Network(
        SanaVelocity(transformer).eval(),
        ports=(
            Port("latents", "state", "float32", (config.in_channels, *size)),
            Port("timesteps", "time", "float32", ()),
            Port("captions", "condition", "float32", (tokens, config.caption_channels)),
            Port("mask", "condition", "float32", (tokens,), masks="captions"),
            *[WEIGHT] * config.guidance_embeds,
        ),
        guidance=4.5,
        guidance_port=WEIGHT.name if config.guidance_embeds else "",
    )


def scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return diffusers' config: SCM for Sprint, DPM-Solver++ on a flow for Sana."""
    if config["guidance_embeds"]:
        return {"_class_name": "SCMScheduler", "prediction_type": "trigflow"}
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return {"_class_name": "DPMSolverMultistepScheduler", **flow}


SANA = Family(
    "SanaTransformer2DModel",
    network,
    tokens={"SanaPipeline": 300, "SanaSprintPipeline": 300},
    scheduler=scheduler,
    pixels=32,
    flow_spacing="linspace",
    steps=lambda config: 2 if config["guidance_embeds"] else 20,
    linear_attention=(SanaLinearAttnProcessor2_0,),
    text=Text(
        SanaPrompt,
        prompts=(
            Tokens("ids", "tokenizer", extra=-EXTRA, mask="ids_mask", before=instruction, lowercase=True, side="right"),
        ),
        gives=("captions", "mask"),
    ),
)
