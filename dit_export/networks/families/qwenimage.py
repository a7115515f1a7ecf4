"""Qwen-Image (Wu et al., arXiv 2508.02324): packed latents, prompts of any length, each token's norm restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.families.family import Family
from dit_export.networks.families.packing import PATCH, pack, unpack
from dit_export.networks.rules import Renormalized
from dit_export.networks.text import Text, Tokens
from dit_runtime.bundle.manifest import Port

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED = 34  # tokens of the template before the prompt, which the transformer does not read


class QwenImageVelocity(nn.Module):
    """Name the inputs of QwenImageTransformer2DModel, which reads σ and packed latents and gives dx/dσ.

    The positions of text start where those of the picture end, whatever the prompt.
    """

    def __init__(self, transformer: Any, size: tuple[int, int]) -> None:
        super().__init__()
        self.transformer = transformer
        self.size = size

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Tensor, mask: Tensor) -> Tensor:
        height, width = self.size
        velocity = self.transformer(
            pack(latents),
            timestep=timesteps,
            encoder_hidden_states=captions,
            encoder_hidden_states_mask=mask > 0.5,
            img_shapes=[[(1, height // PATCH, width // PATCH)]],
            return_dict=False,
        )[0]
        return unpack(velocity, self.size)


class QwenImagePrompt(nn.Module):
    """Return the last hidden states of Qwen2.5-VL's language half after the template's start, zeros after the end."""

    def __init__(self, encoders: Mapping[str, Any], transformer: Any, tokens: int) -> None:
        super().__init__()
        self.language = encoders["text_encoder"].model.language_model

    def forward(self, ids: Tensor, ids_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.language(input_ids=ids, attention_mask=ids_mask, use_cache=False).last_hidden_state
        mask = ids_mask[:, DROPPED:].float()
        return hidden[:, DROPPED:] * mask[..., None], mask


def network(transformer: Any, size: tuple[int, int], tokens: int) -> Network:
    config = transformer.config
    return Network(
        QwenImageVelocity(transformer, size).eval(),
        ports=(
            Port("latents", "state", "float32", (config.in_channels // PATCH**2, *size)),
            Port("timesteps", "time", "float32", ()),
            Port("captions", "condition", "float32", (tokens, config.joint_attention_dim)),
            Port("mask", "condition", "float32", (tokens,), masks="captions"),
        ),
        rule=Renormalized(PATCH, PATCH),
    )


QWEN_IMAGE = Family(
    "QwenImageTransformer2DModel",
    network,
    tokens={"QwenImagePipeline": 512},
    scheduler=lambda config: {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": True,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    },
    flow_spacing="trailing",
    steps=lambda config: 50,
    size=128,
    text=Text(
        QwenImagePrompt,
        prompts=(Tokens("ids", "tokenizer", extra=DROPPED, mask="ids_mask", template=TEMPLATE, side="right"),),
        gives=("captions", "mask"),
    ),
    supported={
        "patch_size": (PATCH,),
        "guidance_embeds": (False,),
        "zero_cond_t": (False,),
        "use_additional_t_cond": (False,),
        "use_layer3d_rope": (False,),
    },
)
