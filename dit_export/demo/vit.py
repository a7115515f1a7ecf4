"""The judge: a small Vision Transformer (Dosovitskiy et al., arXiv 2010.11929) that names a picture's class.

Its patches are made by four convolutions (Xiao et al., "Early convolutions help transformers see better",
arXiv 2106.14881): one large one needs many more pictures before it sees a shape's outline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from dit_export.networks.dit import MLP, Attention, position_table


@dataclass(frozen=True)
class ViTSpec:
    num_classes: int
    image_size: int = 64
    hidden: int = 96
    depth: int = 4
    heads: int = 3
    mlp_ratio: float = 4.0


class Judgement(NamedTuple):
    logits: Tensor  # (N, classes)
    features: Tensor  # (N, D)


class Block(nn.Module):
    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.hidden)
        self.attn = Attention(spec.hidden, spec.heads)
        self.norm2 = nn.LayerNorm(spec.hidden)
        self.mlp = MLP(spec.hidden, int(spec.mlp_ratio * spec.hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def stem(channels: int, out: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out, 3, stride, padding=1), nn.GroupNorm(8, out), nn.GELU("tanh")


class ViT(nn.Module):
    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.spec = spec
        quarter, half, full = spec.hidden // 4, spec.hidden // 2, spec.hidden
        self.patches = nn.Sequential(
            *stem(3, quarter, stride=2), *stem(quarter, half, stride=2), *stem(half, half), *stem(half, full, stride=2)
        )
        positions = position_table(spec.hidden, (spec.image_size // 8,) * 2)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(*(Block(spec) for _ in range(spec.depth)))
        self.norm = nn.LayerNorm(spec.hidden)
        self.head = nn.Linear(spec.hidden, spec.num_classes)

    def forward(self, images: Tensor) -> Judgement:
        """(N, 3, H, W) in [0, 1], as the decoder gives them."""
        x = self.patches(2 * images - 1).flatten(2).transpose(1, 2) + self.positions  # (N, T, D)
        features = self.norm(self.blocks(x)).mean(dim=1)  # (N, D)
        return Judgement(self.head(features), features)
