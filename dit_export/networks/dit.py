"""The Diffusion Transformer (Peebles & Xie, arXiv 2212.09748) in plain PyTorch, in either dialect of its weights."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_export.spec import ModelSpec
from dit_runtime.captions import examples

FREQUENCIES = 256
MAX_PERIOD = 10_000.0
NORM_EPS = 1e-6
MASKED = 10_000.0  # taken from the score of a token that a caption does not have


def timestep_frequencies(shift: int) -> Tensor:
    """f_i = 10000^(-i / (half - shift)) in float32, as the checkpoints' own code rounds it; (half,)."""
    half = FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float32, device="cpu") / (half - shift)
    return torch.exp(-math.log(MAX_PERIOD) * exponents)


def position_table(width: int, grid: tuple[int, int], span: float = 0.0) -> Tensor:
    """The fixed 2-D sin-cos table: a quarter of the channels each for sin x, cos x, sin y, cos y.

    Patches are counted, or spread over `span`, the side that the weights were trained at.
    """
    omega = MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def waves(count: int) -> Tensor:
        places = torch.arange(count, dtype=torch.float64) * ((span or count) / count)
        angles = places[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (count, D/2)

    rows, columns = waves(grid[0])[:, None, :], waves(grid[1])[None, :, :]
    table = torch.cat([columns.expand(*grid, -1), rows.expand(*grid, -1)], dim=-1)
    return table.reshape(1, grid[0] * grid[1], width).float()  # (1, T, D)


class Embedder(nn.Module):
    """MLP(frequencies(t)) and table[y], whose last row is the null label of guidance."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        # A constant of the graph, not an op: one ulp of f, times t = 999, is 1e-4 of an angle.
        self.frequencies = timestep_frequencies(spec.frequency_shift)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, spec.hidden), nn.SiLU(), nn.Linear(spec.hidden, spec.hidden))
        self.label = None if spec.by.captioned else nn.Embedding(spec.num_classes + 1, spec.hidden)

    def forward(self, timesteps: Tensor, labels: Tensor | None) -> list[Tensor]:
        angles = timesteps[:, None] * self.frequencies.to(timesteps.device)  # (N, half); t stays float32
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return [time] if self.label is None else [time, self.label(labels)]  # (N, D) each


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + bias) v; (N, T, D), (N, L, D) twice, (N, L) -> (N, T, D)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))  # (N, heads, T, d)
    if bias is not None:
        # Repeated for all T: ONNX Runtime's Attention takes no mask that has one row for them.
        bias = bias.unflatten(1, (1, 1, -1)).expand(-1, -1, q.shape[2], -1)  # (N, 1, T, L)
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(q, k, v, self.heads))


class CrossAttention(nn.Module):
    """From every patch to the condition's tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.kv(tokens).chunk(2, dim=-1)
        return keys, values  # (N, L, D) each

    def forward(self, x: Tensor, tokens: Tensor, bias: Tensor | None) -> Tensor:
        return self.proj(attend(self.q(x), *self.keys_and_values(tokens), self.heads, bias))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out or width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Offset(nn.Module):
    """adaLN-single: what one projection makes for all blocks, plus a table of the block's own."""

    def __init__(self, vectors: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(vectors, width))

    def forward(self, shared: Tensor) -> Tensor:
        return shared + self.table.flatten()


class Modulated(NamedTuple):
    """adaLN around one branch: x += gate · branch(gain · LN(x) + shift); vectors are (N, 1, D)."""

    gain: Tensor  # 1 + scale
    shift: Tensor
    gate: Tensor | None = None


def modulate(x: Tensor, by: Modulated | None) -> Tensor:
    return x if by is None else x * by.gain + by.shift


def gated(x: Tensor, by: Modulated | None) -> Tensor:
    return x if by is None or by.gate is None else by.gate * x


class Condition(NamedTuple):
    """The timestep and the label or caption, as a block takes them in."""

    modulation: Tensor | None = None  # (N, D), or (N, 6 D) where one projection is shared
    tokens: Tensor | None = None  # (N, L, D), of a cross-attention or beside the patches
    bias: Tensor | None = None  # (N, L) on the cross-attention's scores


def modulation(spec: ModelSpec, vectors: int) -> nn.Module | None:
    """What turns a condition into this many vectors; none where norms have gains of their own."""
    if not spec.by.modulation:
        return None
    return Offset(vectors, spec.hidden) if spec.by.shared else nn.Linear(spec.hidden, vectors * spec.hidden)


def norm(spec: ModelSpec, eps: float = NORM_EPS) -> nn.LayerNorm:
    """Without a gain and a shift of its own where adaLN brings them."""
    return nn.LayerNorm(spec.hidden, eps, elementwise_affine=not spec.by.modulation)


class Block(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.count = spec.by.modulation
        self.norm1 = norm(spec)
        self.attn = Attention(spec.hidden, spec.heads)
        self.cross = CrossAttention(spec.hidden, spec.heads) if spec.by.crossed else None
        # A modulated block's cross-attention reads the residual stream as it is.
        self.norm_cross = norm(spec) if spec.by.crossed and not spec.by.modulation else nn.Identity()
        self.norm2 = norm(spec, spec.norm2_eps)
        self.mlp = MLP(spec.hidden, round(spec.mlp_ratio * spec.hidden))
        self.modulation = modulation(spec, self.count)

    def vectors(self, condition: Condition) -> tuple[Modulated, Modulated] | tuple[None, None]:
        """For attention and MLP; the columns are (shift, scale) or (shift, scale, gate) twice."""
        if self.modulation is None:
            return None, None
        parts = self.modulation(condition.modulation)[:, None].chunk(self.count, dim=-1)
        first, second = parts[: self.count // 2], parts[self.count // 2 :]
        return Modulated(1 + first[1], first[0], *first[2:]), Modulated(1 + second[1], second[0], *second[2:])

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        attn, mlp = self.vectors(condition)
        x = x + gated(self.attn(modulate(self.norm1(x), attn)), attn)
        if self.cross is not None:
            x = x + self.cross(self.norm_cross(x), condition.tokens, condition.bias)
        return x + gated(self.mlp(modulate(self.norm2(x), mlp)), mlp)


class Final(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm = norm(spec)
        self.modulation = modulation(spec, 2)
        self.linear = nn.Linear(spec.hidden, spec.patch**2 * spec.out_channels)

    def vectors(self, condition: Condition) -> Modulated | None:
        if self.modulation is None:
            return None
        shift, scale = self.modulation(condition.modulation)[:, None].chunk(2, dim=-1)
        return Modulated(1 + scale, shift)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        return self.linear(modulate(self.norm(x), self.vectors(condition)))  # (N, T, p·p·C_out)


class DiT(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.patches = nn.Conv2d(spec.channels, spec.hidden, spec.patch, stride=spec.patch)
        self.register_buffer("positions", position_table(spec.hidden, spec.grid, spec.position_span))
        self.embedders = nn.ModuleList(Embedder(spec) for _ in range(spec.embedders))
        self.shared = nn.Linear(spec.hidden, spec.by.modulation * spec.hidden) if spec.by.shared else None
        self.caption = MLP(spec.caption_channels, spec.hidden, spec.hidden) if spec.by.captioned else None
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.final = Final(spec)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        labels: Tensor | None = None,
        captions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(N, C, H, W), (N,) and (N,) or (N, L, 4096), (N, L) -> (N, C_out, H, W): the prediction's channels, then the
        variance's."""
        conditions, last = self.conditions(timesteps, labels, captions, mask)
        x = self.patches(latents).flatten(2).transpose(1, 2) + self.positions  # (N, T, D)
        if self.spec.by.appended:
            x = torch.cat([x, cast(Tensor, conditions[0].tokens)], dim=1)  # (N, T + 2, D)
        for block, condition in zip(self.blocks, conditions, strict=True):
            x = block(x, condition)
        if self.spec.by.appended:
            x = x[:, : self.spec.tokens]
        return self.unpatchify(self.final(x, last))

    def conditions(
        self, timesteps: Tensor, labels: Tensor | None, captions: Tensor | None, mask: Tensor | None
    ) -> tuple[list[Condition], Condition]:
        """Of the blocks, and of the final layer."""
        embedded = [embedder(timesteps, labels) for embedder in self.embedders]
        repeats = self.spec.depth // len(embedded)
        if self.shared is not None:
            time = embedded[0][0]
            told = Condition(self.shared(F.silu(time)), *self.read(captions, mask))
            return [told] * repeats, Condition(torch.cat([time, time], dim=-1))
        if self.spec.by.modulation:
            found = [Condition(F.silu(time + label)) for time, label in embedded]
        else:
            found = [Condition(tokens=torch.stack(pair, dim=1)) for pair in embedded]
        return found * repeats, found[0]

    def read(self, captions: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """A caption's tokens, (N, L, D), and what is added to the scores of each, (N, L)."""
        if self.caption is None or captions is None or mask is None:
            return None, None
        return self.caption(captions), (mask - 1) * MASKED

    def vectors(self, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """All K vectors of a step, in the order in which the loop reads them; (N, K, D)."""
        conditions, last = self.conditions(timesteps, labels, None, None)
        rows: list[Tensor | None] = [conditions[0].tokens] if self.spec.by.appended else []
        for block, condition in zip(cast(list[Block], self.blocks), conditions, strict=True):
            attn, mlp = block.vectors(condition)
            rows += attn or ()
            if block.cross is not None and condition.tokens is not None:
                rows += block.cross.keys_and_values(condition.tokens)
            rows += mlp or ()
        rows += self.final.vectors(last) or ()
        return torch.cat([row for row in rows if row is not None], dim=1)

    def context(self, captions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """All M vectors of a caption, each block's keys and values, (N, M, D), and what is added to scores, (N, L)."""
        tokens, bias = self.read(captions, mask)
        assert tokens is not None and bias is not None
        crossed = [block.cross for block in cast(list[Block], self.blocks)]
        parts = [part for cross in crossed if cross is not None for part in cross.keys_and_values(tokens)]
        return torch.cat(parts, dim=1), bias

    def told(self, numbers: Tensor) -> dict[str, Tensor]:
        """What `forward` takes besides latents and timesteps: labels, or the example captions of these numbers."""
        if not self.spec.by.captioned:
            return {"labels": numbers}
        found = examples(numbers.numpy(), self.spec.caption_tokens, self.spec.caption_channels)
        return {"captions": torch.from_numpy(found.embeddings), "mask": torch.from_numpy(found.mask)}

    def unpatchify(self, x: Tensor) -> Tensor:
        p = self.spec.patch
        x = x.unflatten(2, (p, p, -1)).unflatten(1, self.spec.grid)  # (N, h, w, p, q, C_out)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
