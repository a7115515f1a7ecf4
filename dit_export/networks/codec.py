"""VAEs of diffusers as decoders, latents to images: one small class a VAE class, in CODECS."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from dit_export.networks import tiles
from dit_runtime.errors import UsageError, nearest


class Decoder(nn.Module):
    """Decode latents (B, channels, H, W) to images in [0, 1], (B, 3, pixels · H, pixels · W); of videos with frames."""

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # values of the VAE's config fields

    def __init__(self, channels: int, pixels: int) -> None:
        super().__init__()
        self.channels, self.pixels = channels, pixels

    def expected_counts(self) -> dict[str, int]:
        """Return how often each pass must fire in this decoder's graph; {}: nothing is predicted."""
        return {}


class KL(Decoder):
    """images = clamp(VAE(latents / scaling + shift) / 2 + 1/2); each stage but one doubles the side."""

    supported: ClassVar = {"out_channels": (3,), "latents_mean": (None,), "latents_std": (None,)}

    def __init__(self, vae: Any) -> None:
        super().__init__(vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1))
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.tiles = tiles.of_decoder(vae)
        self.scaling = float(vae.config.get("scaling_factor", 1.0))
        self.shift = float(vae.config.get("shift_factor") or 0.0)

    def forward(self, latents: Tensor) -> Tensor:
        latents = latents / self.scaling + self.shift  # (B, C, H, W)
        images = self.tiles(self.decode, latents) if self.tiles else self.decode(latents)
        return (images / 2 + 0.5).clamp(0, 1)  # (B, 3, 8H, 8W)

    def decode(self, latents: Tensor) -> Tensor:
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        images: Tensor = self.decoder(latents)
        return images

    def expected_counts(self) -> dict[str, int]:
        if self.tiles:  # so many times for each
            return {}

        def count(*kinds: type[nn.Module]) -> int:
            return sum(isinstance(module, kinds) for module in self.modules())

        doubled = count(Upsample2D)  # their convolutions become four each
        convs = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        kernels = sum(max(conv.kernel_size) > 1 for conv in convs) - 2  # but the first and the last
        return {
            "subpixel": doubled,
            "depth_to_space": doubled,
            "group_norm": count(nn.GroupNorm),
            "plain_attention": count(Attention),
            "masked_attention": 0,
            "split_qkv": 0,
            "integer_products": 0,
            "quantize_convolutions": kernels,
            "divide_apart": kernels,
            "quantize_outputs": kernels + 3 * doubled,
            "cast_to_half": count(nn.Conv2d, nn.Linear, Attention) + 3 * doubled,
        }


class KLFlux2(KL):
    """KL, of latents whose cells are 2 x 2 of the VAE's, normalized as its batch norm says."""

    supported: ClassVar = {"out_channels": (3,), "patch_size": ((2, 2), [2, 2])}

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.channels, self.pixels = 4 * self.channels, 2 * self.pixels
        self.bn = vae.bn

    def forward(self, latents: Tensor) -> Tensor:
        deviation = (self.bn.running_var + self.bn.eps).sqrt()
        latents = latents * deviation[:, None, None] + self.bn.running_mean[:, None, None]  # (B, 4C, H, W)
        return super().forward(F.pixel_shuffle(latents, 2))


class LTXVideo(Decoder):
    """videos = clamp(VAE(latents deviation / scaling + mean) / 2 + 1/2), (B, 3, 8 (F - 1) + 1, 32 H, 32 W)."""

    supported: ClassVar = {
        "out_channels": (3,),
        "timestep_conditioning": (False,),
        "patch_size_t": (1,),
        "temporal_compression_ratio": (None, 8),
    }

    def __init__(self, vae: Any) -> None:
        super().__init__(vae.config.latent_channels, vae.spatial_compression_ratio)
        self.vae = vae
        self.scaling = float(vae.config.scaling_factor)

    def forward(self, latents: Tensor) -> Tensor:
        mean, deviation = (value[:, None, None, None] for value in (self.vae.latents_mean, self.vae.latents_std))
        return (self.vae.decoder(latents * deviation / self.scaling + mean) / 2 + 0.5).clamp(0, 1)


class DC(Decoder):
    """images = clamp(VAE(latents / scaling) / 2 + 1/2) (Chen et al. 2024, arXiv 2410.10733)."""

    supported: ClassVar = {"in_channels": (3,)}

    def __init__(self, vae: Any) -> None:
        super().__init__(vae.config.latent_channels, vae.spatial_compression_ratio)
        self.decoder = vae.decoder
        self.scaling = float(vae.config.scaling_factor)

    def forward(self, latents: Tensor) -> Tensor:
        return (self.decoder(latents / self.scaling) / 2 + 0.5).clamp(0, 1)


class KLQwenImage(Decoder):
    """images = clamp(VAE(latents · std + mean) / 2 + 1/2): a video's decoder, of one frame.

    Before the first frame a causal convolution sees zeros, so that the last slice of its kernel is all that counts.
    """

    supported: ClassVar = {"input_channels": (3,)}
    mean: Tensor
    std: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__(vae.config.z_dim, vae.spatial_compression_ratio)
        decoder = nn.Sequential(vae.post_quant_conv, vae.decoder)
        shared = {id(parameter): parameter for parameter in decoder.parameters()}
        frames = {id(conv): FrameConv(conv) for conv in decoder.modules() if isinstance(conv, QwenImageCausalConv3d)}
        self.decoder = copy.deepcopy(decoder, shared | frames)
        for name in ("mean", "std"):
            values = torch.tensor(vae.config[f"latents_{name}"]).view(-1, 1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        frames = self.decoder(latents[:, :, None] * self.std + self.mean)  # (B, 3, 1, 8H, 8W)
        return (frames[:, :, 0] / 2 + 0.5).clamp(0, 1)


class FrameConv(nn.Module):
    """Do to one frame what a causal convolution over frames does to the first."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight[:, :, -1], requires_grad=False)
        self.bias = conv.bias
        self.padding = conv._padding[2], conv._padding[0]  # of height and width

    def forward(self, frames: Tensor) -> Tensor:
        return F.conv2d(frames[:, :, 0], self.weight, self.bias, padding=self.padding)[:, :, None]


CODECS: dict[str, Any] = {  # by the class of the VAE in diffusers
    "AutoencoderKL": KL,
    "AutoencoderDC": DC,
    "AutoencoderKLQwenImage": KLQwenImage,
    "AutoencoderKLFlux2": KLFlux2,
    "AutoencoderKLLTXVideo": LTXVideo,
}


def make_decoder(vae: Any) -> Decoder:
    """Return the decoder of a VAE of diffusers, in eval mode; its weights are the VAE's."""
    name = type(vae).__name__
    if name not in CODECS:
        raise UsageError(f"{name}: not a known VAE{nearest(name, CODECS)}; known: {', '.join(CODECS)}")
    decoder: Decoder = CODECS[name](vae)
    return decoder.eval()
