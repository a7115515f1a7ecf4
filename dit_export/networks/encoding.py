"""VAEs of diffusers as encoders, images to latents: one small class a VAE class, in ENCODERS.

An encoder undoes the decoder of its class in `codec.py`: images in [0, 1] become latents as the network's state has
them. It gives `mean` and, where diffusers' pipelines draw a picture's latents, `logvar` of their normal distribution.
"""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn

from dit_export.networks import tiles
from dit_export.networks.codec import FrameConv
from dit_runtime.errors import UsageError

LOGVAR = -30.0, 20.0  # where diffusers clamps it


class Encoder(nn.Module):
    """Encode images in [0, 1], (B, 3, pixels · H, pixels · W), to latents (B, channels, H, W), one for each output."""

    gives: ClassVar[tuple[str, ...]] = ("mean", "logvar")

    def expected_counts(self) -> dict[str, int]:
        """Return how often each pass must fire in this encoder's graph; {}: nothing is predicted."""
        return {}


class KL(Encoder):
    """mean = (VAE(2 images - 1) - shift) scaling."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.tiles = tiles.of_encoder(vae)
        self.scaling = float(vae.config.get("scaling_factor", 1.0))
        self.shift = float(vae.config.get("shift_factor") or 0.0)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        images = 2 * images - 1
        moments = self.tiles(self.encode, images) if self.tiles else self.encode(images)
        mean, logvar = moments.chunk(2, dim=1)  # (B, C, H, W) each
        return (mean - self.shift) * self.scaling, logvar.clamp(*LOGVAR) + 2 * math.log(self.scaling)

    def encode(self, images: Tensor) -> Tensor:
        moments: Tensor = self.encoder(images)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def expected_counts(self) -> dict[str, int]:
        if self.tiles:  # so many times for each
            return {}

        def count(*kinds: type[nn.Module]) -> int:
            return sum(isinstance(module, kinds) for module in self.modules())

        return {
            "depth_to_space": 0,
            "group_norm": count(nn.GroupNorm),
            "plain_attention": count(Attention),
            "masked_attention": 0,
            "split_qkv": 0,
            "integer_products": 0,
            "cast_to_half": count(nn.Conv2d, nn.Linear, Attention),
        }


class KLFlux2(KL):
    """KL, of latents whose cells are 2 x 2 of the VAE's, normalized as its batch norm says; the pipelines draw none."""

    gives: ClassVar = ("mean",)

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.scaling, self.shift = 1.0, 0.0
        self.bn = vae.bn

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        mean, _ = super().forward(images)
        deviation = (self.bn.running_var + self.bn.eps).sqrt()
        latents = F.pixel_unshuffle(mean, 2)  # (B, 4C, H / 2, W / 2)
        return ((latents - self.bn.running_mean[:, None, None]) / deviation[:, None, None],)


class DC(Encoder):
    """mean = VAE(2 images - 1) scaling: these latents have no variance."""

    gives: ClassVar = ("mean",)

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.scaling = float(vae.config.scaling_factor)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.encoder(2 * images - 1) * self.scaling,)


class KLQwenImage(Encoder):
    """mean = (VAE(2 images - 1) - latents_mean) / latents_std: a video's encoder, of one frame."""

    mean: Tensor
    std: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        encoder = nn.Sequential(vae.encoder, vae.quant_conv)
        shared = {id(parameter): parameter for parameter in encoder.parameters()}
        frames = {id(conv): FrameConv(conv) for conv in encoder.modules() if isinstance(conv, QwenImageCausalConv3d)}
        self.encoder = copy.deepcopy(encoder, shared | frames)
        for name in ("mean", "std"):
            values = torch.tensor(vae.config[f"latents_{name}"]).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        moments = self.encoder(2 * images[:, :, None] - 1)[:, :, 0]  # (B, 2C, H, W)
        mean, logvar = moments.chunk(2, dim=1)
        return (mean - self.mean) / self.std, logvar.clamp(*LOGVAR) - 2 * self.std.log()


ENCODERS: dict[str, Any] = {  # by the class of the VAE in diffusers
    "AutoencoderKL": KL,
    "AutoencoderDC": DC,
    "AutoencoderKLQwenImage": KLQwenImage,
    "AutoencoderKLFlux2": KLFlux2,
}


def make_encoder(vae: Any) -> Encoder:
    """Return the encoder of a VAE of diffusers, in eval mode; its weights are the VAE's."""
    name = type(vae).__name__
    if name not in ENCODERS:
        raise UsageError(f"{name}: no encoder is known; known: {', '.join(ENCODERS)}. Build without --encoder")
    encoder: Encoder = ENCODERS[name](vae)
    return encoder.eval()
