"""Z-Image and Z-Image-Turbo (Z-Image Team, arXiv 2511.22699): image and prompt in one sequence, filled up by tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.families.encoders import SecondLastLayer
from dit_export.networks.families.family import Family
from dit_export.networks.families.positions import Positions, pack, unpack
from dit_export.networks.text import Text, Tokens
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError

PATCH, FILLED = 2, 32  # cells along a token; prompts and images are filled up to a multiple of so many tokens
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # what Qwen3's makes of a message
TURBO_SHIFT = 3.0  # of the σ; nothing else in published files tells Z-Image-Turbo from Z-Image, which has 6


class ZImageVelocity(nn.Module):
    """Run the layers of ZImageTransformer2DModel, which read 1 - σ and give -dx/dσ, with masks for prompts' lengths.

    A learned token fills a prompt up to a multiple of 32, and another one the image. Attention sees both.
    """

    def __init__(self, transformer: Any, size: tuple[int, int], tokens: int) -> None:
        super().__init__()
        self.transformer, self.size = transformer, size
        height, width = (side // PATCH for side in size)
        self.filling = -height * width % FILLED
        rope = transformer.rope_embedder
        tables = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, rope.theta)
        self.positions = Positions(tables, 1 + torch.arange(tokens), (height, width))

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Tensor, mask: Tensor) -> Tensor:
        model = self.transformer
        time = model.t_embedder((1 - timesteps) * model.t_scale)
        count = mask.sum(1, keepdim=True).long()
        filled = (count + FILLED - 1) // FILLED * FILLED
        present = torch.arange(mask.shape[1]) < filled
        text = torch.where((mask > 0.5)[..., None], model.cap_embedder(captions), model.cap_pad_token)
        for_text, for_image = self.positions(filled[:, 0] + 1)
        image = model.all_x_embedder[f"{PATCH}-1"](pack(latents, PATCH))
        if self.filling:
            there = image.shape[1]
            tokens = F.pad(model.x_pad_token.expand(self.filling, -1), (0, 0, there, 0))  # zeros at the image's own
            image = F.pad(image, (0, 0, 0, self.filling)) + tokens
            still = torch.tensor([1.0, 0.0]).expand(*for_image.shape[:1], self.filling, *for_image.shape[2:])
            for_image = torch.cat([for_image, still], 1)
        joint_positions = torch.cat([for_image, for_text], 1)
        for layer in model.noise_refiner:
            image = layer(image, None, torch.view_as_complex(for_image), time)
        for layer in model.context_refiner:
            text = layer(text, present, torch.view_as_complex(for_text))
        joint = torch.cat([image, text], 1)
        present = F.pad(present, (image.shape[1], 0), value=True)
        for layer in model.layers:
            joint = layer(joint, present, torch.view_as_complex(joint_positions), time)
        tokens = joint[:, : image.shape[1] - self.filling]
        return -unpack(model.all_final_layer[f"{PATCH}-1"](tokens, c=time), self.size, PATCH)


def network(transformer: Any, size: tuple[int, int], tokens: int) -> Network:
    config = transformer.config
    if tokens % FILLED:
        raise UsageError(f"{Z_IMAGE.name}: captions of {tokens} tokens; expected a multiple of {FILLED}")
    return Network(
        ZImageVelocity(transformer, size, tokens).eval(),
        ports=(
            Port("latents", "state", "float32", (config.in_channels, *size)),
            Port("timesteps", "time", "float32", ()),
            Port("captions", "condition", "float32", (tokens, config.cap_feat_dim)),
            Port("mask", "condition", "float32", (tokens,), masks="captions"),
        ),
        guidance=6.0,  # the pipeline's guidance_scale is one less
    )


Z_IMAGE = Family(
    "ZImageTransformer2DModel",
    network,
    tokens={"ZImagePipeline": 512},
    scheduler=lambda config: {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0},
    flow_spacing="trailing",
    steps=lambda config: 8 if config.get("distilled") else 50,
    distilled=lambda pipeline, scheduler: scheduler.get("shift") == TURBO_SHIFT,
    size=128,
    patch=PATCH,
    text=Text(
        SecondLastLayer,
        prompts=(
            Tokens(
                "ids", "tokenizer", mask="ids_mask", template=TEMPLATE, chat={"enable_thinking": True}, side="right"
            ),
        ),
        gives=("captions", "mask"),
    ),
    ahead=("context_refiner",),
    supported={"all_patch_size": ((PATCH,), [PATCH]), "all_f_patch_size": ((1,), [1]), "siglip_feat_dim": (None,)},
)
