"""The Diffusion Transformer (Peebles & Xie, arXiv 2212.09748) in plain PyTorch, in either dialect of its weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_export.spec import ModelSpec

FREQUENCIES = 256
MAX_PERIOD = 10_000.0
NORM_EPS = 1e-6


def norm(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """LayerNorm without affine parameters: adaLN brings them."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def timestep_frequencies(shift: int) -> Tensor:
    """f_i = 10000^(-i / (half - shift)) in float32, as the checkpoints' own code rounds it; (half,)."""
    half = FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float32, device="cpu") / (half - shift)
    return torch.exp(-math.log(MAX_PERIOD) * exponents)


def position_table(width: int, grid: int) -> Tensor:
    """The fixed 2-D sin-cos table: a quarter of the channels each for sin x, cos x, sin y, cos y."""
    omega = MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (grid, D/4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D/2)
    columns = waves[None, :, :].expand(grid, grid, -1)
    rows = waves[:, None, :].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, width).float()  # (1, T, D)


class Embedder(nn.Module):
    """c = MLP(frequencies(t)) + table[y]; the table's last row is the null label of guidance."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        # A constant of the graph, not an op: one ulp of f, times t = 999, is 1e-4 of an angle.
        self.frequencies = timestep_frequencies(spec.frequency_shift)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, spec.hidden), nn.SiLU(), nn.Linear(spec.hidden, spec.hidden))
        self.label = nn.Embedding(spec.num_classes + 1, spec.hidden)

    def forward(self, timesteps: Tensor, labels: Tensor) -> Tensor:
        angles = timesteps[:, None] * self.frequencies.to(timesteps.device)  # (N, half); t stays float32
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (N, 256)
        return self.time(waves) + self.label(labels)  # (N, D)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (N, T, D)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulated(NamedTuple):
    """adaLN-Zero around one branch: x += gate · branch(gain · LN(x) + shift); vectors are (N, 1, D)."""

    gain: Tensor  # 1 + scale
    shift: Tensor
    gate: Tensor


class Block(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm2_eps = spec.norm2_eps
        self.attn = Attention(spec.hidden, spec.heads)
        self.mlp = MLP(spec.hidden, round(spec.mlp_ratio * spec.hidden))
        self.modulation = nn.Linear(spec.hidden, 6 * spec.hidden)

    def vectors(self, condition: Tensor) -> tuple[Modulated, Modulated]:
        """For attention and MLP; the linear's columns are (shift, scale, gate) twice."""
        parts = self.modulation(condition)[:, None].chunk(6, dim=-1)
        return Modulated(1 + parts[1], parts[0], parts[2]), Modulated(1 + parts[4], parts[3], parts[5])

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        attn, mlp = self.vectors(condition)
        x = x + attn.gate * self.attn(norm(x) * attn.gain + attn.shift)
        return x + mlp.gate * self.mlp(norm(x, self.norm2_eps) * mlp.gain + mlp.shift)


class Final(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.modulation = nn.Linear(spec.hidden, 2 * spec.hidden)
        self.linear = nn.Linear(spec.hidden, spec.patch**2 * spec.out_channels)

    def vectors(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return 1 + scale, shift

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, shift = self.vectors(condition)
        return self.linear(norm(x) * gain + shift)  # (N, T, p·p·C_out)


class DiT(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.grid = spec.latent_size // spec.patch
        self.patches = nn.Conv2d(spec.channels, spec.hidden, spec.patch, stride=spec.patch)
        self.register_buffer("positions", position_table(spec.hidden, self.grid))
        self.embedders = nn.ModuleList(Embedder(spec) for _ in range(spec.embedders))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.final = Final(spec)

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """(N, C, H, W), (N,), (N,) -> (N, C_out, H, W): the prediction's channels, then the variance's."""
        conditions = self.conditions(timesteps, labels)
        x = self.patches(latents).flatten(2).transpose(1, 2) + self.positions  # (N, T, D)
        for block, condition in zip(self.blocks, conditions, strict=True):
            x = block(x, condition)
        return self.unpatchify(self.final(x, conditions[0]))

    def conditions(self, timesteps: Tensor, labels: Tensor) -> list[Tensor]:
        """SiLU(c) for each block, (N, D) each; the final layer takes the first."""
        embedded = [F.silu(embedder(timesteps, labels)) for embedder in self.embedders]
        return embedded * (self.spec.depth // len(embedded))

    def vectors(self, timesteps: Tensor, labels: Tensor) -> Tensor:
        """All K vectors that the blocks and the final layer read, in that order; (N, K, D)."""
        conditions = self.conditions(timesteps, labels)
        rows: list[Tensor] = []
        for block, condition in zip(self.blocks, conditions, strict=True):
            assert isinstance(block, Block)
            rows += [vector for modulated in block.vectors(condition) for vector in modulated]
        return torch.cat(rows + list(self.final.vectors(conditions[0])), dim=1)

    def unpatchify(self, x: Tensor) -> Tensor:
        p = self.spec.patch
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (self.grid, self.grid))  # (N, h, w, p, q, C_out)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
