"""The decoder of a VAE of diffusers: latents to images."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


class Decoder(nn.Module):
    """images = clamp(VAE(latents / scaling + shift) / 2 + 1/2), in [0, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.scaling = float(vae.config.scaling_factor)
        self.shift = float(vae.config.shift_factor or 0.0)

    def forward(self, latents: Tensor) -> Tensor:
        latents = latents / self.scaling + self.shift  # (B, C, H, W)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return (self.decoder(latents) / 2 + 0.5).clamp(0, 1)  # (B, 3, 8H, 8W)

    def expected_counts(self) -> dict[str, int]:
        """Return how often each pass must fire in this decoder's graph."""

        def count(*kinds: type[nn.Module]) -> int:
            return sum(isinstance(module, kinds) for module in self.modules())

        doubled = count(Upsample2D)  # their convolutions become four each
        convs = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        kernels = sum(max(conv.kernel_size) > 1 for conv in convs) - 2  # but the first and the last
        return {
            "subpixel": doubled,
            "group_norm": count(nn.GroupNorm),
            "plain_attention": count(Attention),
            "split_qkv": 0,
            "dynamic": 0,
            "quantize_convolutions": kernels,
            "divide_apart": kernels,
            "quantize_outputs": kernels + 3 * doubled,
            "cast_to_half": count(nn.Conv2d, nn.Linear, Attention) + 3 * doubled,
        }
