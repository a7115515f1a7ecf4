"""The Diffusion Transformer (Peebles & Xie, arXiv 2212.09748) in plain PyTorch, in either dialect of its weights."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_export.networks import Network
from dit_export.networks.spec import ModelSpec, expected_counts, table_name
from dit_runtime.bundle.manifest import Port
from dit_runtime.facts import DEFAULT_GUIDANCE

FREQUENCIES = 256
MAX_PERIOD = 10_000.0
NORM_EPS = 1e-6


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

    frequencies: Tensor  # (half,)

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        # A constant of the graph, not an op: one ulp of f, times t = 999, is 1e-4 of an angle. As a buffer it goes with
        # the network to its device; no checkpoint holds it.
        self.register_buffer("frequencies", timestep_frequencies(spec.frequency_shift), persistent=False)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, spec.hidden), nn.SiLU(), nn.Linear(spec.hidden, spec.hidden))
        self.label = nn.Embedding(spec.num_classes + 1, spec.hidden)

    def forward(self, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        angles = timesteps[:, None] * self.frequencies  # (N, half); t stays float32
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return time, self.label.weight if labels is None else self.label(labels)  # (N, D), or (1, D) without labels


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √d) v; (N, T, D), (N, L, D) twice -> (N, T, D)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))  # (N, heads, T, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


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
    """Attend from every patch to the condition's tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        keys, values = self.kv(tokens).chunk(2, dim=-1)  # (N, L, D) each
        return self.proj(attend(self.q(x), keys, values, self.heads))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulated(NamedTuple):
    """adaLN around one branch: x += gate · branch(gain · LN(x) + shift); vectors are (N, 1, D)."""

    gain: Tensor  # 1 + scale
    shift: Tensor
    gate: Tensor | None = None


def modulate(x: Tensor, modulation: Modulated | None) -> Tensor:
    return x if modulation is None else x * modulation.gain + modulation.shift


def gated(x: Tensor, modulation: Modulated | None) -> Tensor:
    return x if modulation is None or modulation.gate is None else modulation.gate * x


class Condition(NamedTuple):
    """The timestep and the label, as a block reads them."""

    modulation: Tensor | None = None  # (N, D)
    tokens: Tensor | None = None  # (N, 2, D), of a cross-attention or beside the patches


def modulation(spec: ModelSpec, vectors: int) -> nn.Module | None:
    """Return the linear that makes this many vectors of a condition, or None where norms have their own gains."""
    return nn.Linear(spec.hidden, vectors * spec.hidden) if spec.scheme.modulation else None


def norm(spec: ModelSpec, eps: float = NORM_EPS) -> nn.LayerNorm:
    """Make a LayerNorm without a gain and a shift of its own where adaLN brings them."""
    return nn.LayerNorm(spec.hidden, eps, elementwise_affine=not spec.scheme.modulation)


class Block(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.count = spec.scheme.modulation
        self.norm1 = norm(spec)
        self.attn = Attention(spec.hidden, spec.heads)
        self.cross = CrossAttention(spec.hidden, spec.heads) if spec.scheme.crossed else None
        self.norm_cross = norm(spec) if spec.scheme.crossed else nn.Identity()
        self.norm2 = norm(spec, spec.norm2_eps)
        self.mlp = MLP(spec.hidden, round(spec.mlp_ratio * spec.hidden))
        self.modulation = modulation(spec, self.count)

    def vectors(self, condition: Condition) -> tuple[Modulated, Modulated] | tuple[None, None]:
        """Return those for attention and MLP; the columns are (shift, scale) or (shift, scale, gate) twice."""
        if self.modulation is None:
            return None, None
        parts = self.modulation(condition.modulation)[:, None].chunk(self.count, dim=-1)
        first, second = parts[: self.count // 2], parts[self.count // 2 :]
        return Modulated(1 + first[1], first[0], *first[2:]), Modulated(1 + second[1], second[0], *second[2:])

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        attn, mlp = self.vectors(condition)
        x = x + gated(self.attn(modulate(self.norm1(x), attn)), attn)
        if self.cross is not None:
            x = x + self.cross(self.norm_cross(x), condition.tokens)
        return x + gated(self.mlp(modulate(self.norm2(x), mlp)), mlp)


class FinalLayer(nn.Module):
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
        self.patches = nn.Conv2d(spec.channels + spec.low_channels, spec.hidden, spec.patch, stride=spec.patch)
        self.register_buffer("positions", position_table(spec.hidden, spec.grid, spec.position_span))
        self.embedders = nn.ModuleList(Embedder(spec) for _ in range(spec.embedders))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.final = FinalLayer(spec)

    def forward(
        self, latents: Tensor, timesteps: Tensor, labels: Tensor | None = None, low: Tensor | None = None
    ) -> Tensor:
        """(N, C, H, W), (N,), (N,) -> (N, C_out, H, W): the prediction's channels, then the variance's.

        `low` holds the latents of a low-resolution picture, enlarged to the same size, (N, C_low, H, W).
        """
        if low is not None:
            latents = torch.cat([latents, low], dim=1)
        conditions = self.conditions(timesteps, labels)
        x = self.patches(latents).flatten(2).transpose(1, 2) + self.positions  # (N, T, D)
        if self.spec.scheme.appended:
            x = torch.cat([x, cast(Tensor, conditions[0].tokens)], dim=1)  # (N, T + 2, D)
        for block, condition in zip(self.blocks, conditions, strict=True):
            x = block(x, condition)
        if self.spec.scheme.appended:
            x = x[:, : self.spec.tokens]
        return self.unpatchify(self.final(x, conditions[0]))

    def conditions(self, timesteps: Tensor, labels: Tensor | None) -> list[Condition]:
        """Return each block's condition; the final layer reads the first block's."""
        embedded = [embedder(timesteps, labels) for embedder in self.embedders]
        if self.spec.scheme.modulation:
            conditions = [Condition(F.silu(time + label)) for time, label in embedded]
        else:
            conditions = [Condition(tokens=torch.stack(pair, dim=1)) for pair in embedded]
        return conditions * (self.spec.depth // len(conditions))

    def unpatchify(self, x: Tensor) -> Tensor:
        p = self.spec.patch
        x = x.unflatten(2, (p, p, -1)).unflatten(1, self.spec.grid)  # (N, h, w, p, q, C_out)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def resized(model: DiT, spec: ModelSpec) -> DiT:
    """Turn a network into one of the same weights for images of another size."""
    model.spec, model.positions = spec, position_table(spec.hidden, spec.grid, spec.position_span)
    return model


class Velocity(nn.Module):
    """dx/dσ = -v(x, 1 - σ): SiT's own time runs from noise at 0 to data at 1."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(
        self, latents: Tensor, timesteps: Tensor, labels: Tensor | None = None, low: Tensor | None = None
    ) -> Tensor:
        return -self.dit(latents, 1 - timesteps, labels, low)


def dit_network(model: DiT, prediction: str = "epsilon") -> Network:
    """State a DiT's ports; one that predicts velocities gives dx/dσ at the time σ.

    It is guided away from the null label and a picture of zeros, which training puts in the place of dropped ones.
    """
    spec = model.spec
    conditions, null = list[Port](), dict[str, int | float]()
    if spec.num_classes:
        conditions.append(Port("labels", "condition", "int64", (), size=spec.num_classes + 1))
        null["labels"] = spec.null_label
    if spec.low_channels:
        conditions.append(
            Port("low", "condition", "float32", (spec.low_channels, *spec.latent_shape[1:]), picture=True)
        )
        null["low"] = 0.0
    return Network(
        Velocity(model).eval() if prediction == "velocity" else model,
        ports=(
            Port("latents", "state", "float32", spec.latent_shape),
            Port("timesteps", "time", "float32", ()),
            *conditions,
        ),
        null=null,
        guided_channels=spec.guided_channels,
        unguided_up_to_one=spec.unguided_up_to_one,
        guidance=1.0 if spec.low_channels else DEFAULT_GUIDANCE,  # a picture that it enlarges determines the result
        learned_variance=spec.learned_variance,
        model={"name": table_name(spec), "resolution": spec.resolution} | asdict(spec),
        counts=expected_counts(spec),
    )
