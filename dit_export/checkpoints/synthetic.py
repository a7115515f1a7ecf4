"""Made-up weights that behave like a trained DiT's: every input matters, sampling stays bounded, outliers stand out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn

from dit_export.networks.dit import Block, DiT, Embedder, position_table, timestep_frequencies
from dit_export.networks.spec import ModelSpec

# The prediction is PASS·x plus what the blocks add. With eps = a·x + n, DDIM's latents grow by n per e-fold of the
# noise level and shrink by a - 1: a little over 1 keeps ten guided steps bounded, as a trained model's does.
PASS = 1.2
LABEL = 0.17  # relative distance of the predictions for two labels
LATENTS = 1.25  # deviation of the latents in the residual stream
SINK = 20.0  # the constant in an eighth of its channels: it rules LayerNorm's divisor, so that the rest is linear in x
GAIN = 5.0  # mean of 1 + scale, which undoes that division
LEAK = 0.6  # what the blocks write into the latents' own directions, in the same measure for every size
VARIANCE = 0.4  # deviation of the learned-variance channels, which live in about [-1, 1]
DEVIATIONS = (0.5, 0.5, 0.4)  # of shift, scale and gate
FINAL = (0.05, 0.25)
LOGITS = 1.7  # deviation of attention's
SMOOTH = 0.03  # of the range of t: over it the prediction changes
SHORT = 10.0  # a range of t below this is made up for in the weights of its sines
PROBES = (0.15, 0.75)  # of the range of t: where the final layer's scale is measured
OUTLIERS = 4  # channels a layer whose inputs are 8 to 20 times the others'; half of them the same in every block
SD_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}


@torch.no_grad()
def synthetic_dit(spec: ModelSpec, seed: int, span: float = 1000.0) -> DiT:
    """The same weights for the same spec, seed and range of t; one copy in memory."""
    with torch.device("meta"):
        model = DiT(spec)
    model.to_empty(device="cpu").eval().requires_grad_(False)
    random = Generator().manual_seed(seed)
    positions = position_table(spec.hidden, spec.grid, spec.position_span)
    model.load_state_dict({"positions": positions}, strict=False)
    sinks, others = torch.randperm(spec.hidden, generator=random).tensor_split([spec.hidden // 8])
    basis = fill_patches(model.patches, positions, spec.grid, sinks, random)
    for embedder in cast(list[Embedder], model.embedders):
        fill_embedder(embedder, spec, span, random)
    for block in cast(list[Block], model.blocks):
        fill_block(block, spec, sinks, others, random)
    if spec.scheme.appended:
        fill_beacon(model, sinks, int(others[-1]), random)
    gains_of(model.final.modulation, model.final.norm, random).fill(FINAL, sinks, random)
    fill_final(model, basis, span, random)
    return model


def fill_block(block: Block, spec: ModelSpec, sinks: Tensor, others: Tensor, random: Generator) -> None:
    output = min(0.5, LEAK * math.sqrt(spec.hidden / (spec.channels * spec.patch**2) / spec.depth))
    deviations = DEVIATIONS[: spec.scheme.modulation // 2 or 2]
    ungated = output * DEVIATIONS[2]  # as small as a gate makes it
    norms = [
        gains_of(block.modulation, norm, random)
        for norm in (block.norm1, block.norm2)[: 1 if spec.scheme.modulation else 2]
    ]
    for gains in norms:
        gains.fill(deviations, sinks, random)
    fill(block.attn.qkv, 1.0, random)
    block.attn.qkv.weight[: 2 * spec.hidden] *= 1.5  # attention that selects: logits of deviation about 2
    fill(block.mlp.fc1, 1.0, random)
    for linear in (block.attn.proj, block.mlp.fc2):
        fill(linear, output if len(deviations) == 3 else ungated, random)
    own = others[torch.randperm(len(others), generator=random)]
    channels = torch.cat([others[: OUTLIERS // 2], own[: OUTLIERS // 2]]).unique()
    for gains, branch, layer in (
        (norms[0], 0, block.attn.qkv),
        (norms[-1], spec.scheme.modulation // 2, block.mlp.fc1),
    ):
        s = outliers(channels, random)
        gains.stretch(branch, channels, s)
        layer.weight[:, channels] /= s
    outlying_values(block.attn.qkv, block.attn.proj, own[-OUTLIERS // 2 :], random)
    if block.cross is None:
        return
    gains_of(None, cast(nn.LayerNorm, block.norm_cross), random).fill(DEVIATIONS[:2], sinks, random)
    fill(block.cross.q, 1.5, random)
    block.cross.q.weight[:, sinks] = 0  # which the residual stream itself still has
    fill(block.cross.kv, 1.5, random)
    fill(block.cross.proj, 0.4 * ungated, random)
    outlying_values(block.cross.kv, block.cross.proj, own[-OUTLIERS // 2 :], random)


class Gains(NamedTuple):
    """The vectors before a block's branches, whoever makes them: rows of shift, scale and gate, once or twice over."""

    rows: Sequence[Tensor]  # (D,) each: biases, a table, or a norm's own parameters
    one: int  # 1 where a row is scale, 0 where it is the gain itself
    weight: Tensor | None = None  # (n D, D): the part that depends on the condition

    def fill(self, deviations: Sequence[float], sinks: Tensor, random: Generator) -> None:
        """Sink channels are muted: gain and shift 0."""
        for row in self.rows:
            row.normal_(0, 0.6, generator=random)
        for parts, muted in ((self._weights(), 0), (self.rows, self.one)):
            for index, part in enumerate(parts):
                kind = index % len(deviations)
                part *= deviations[kind]
                if kind == 1 and part.ndim == 1:
                    part += GAIN - self.one
                if kind < 2:
                    part[sinks] = -float(kind * muted)

    def stretch(self, branch: int, channels: Tensor, s: Tensor) -> None:
        """gain · s and shift · s, of the branch whose first row this is."""
        for part in self._weights()[branch : branch + 2]:
            part[channels] *= s[:, None]
        if self.rows:
            shift, scale = self.rows[branch : branch + 2]
            shift[channels] *= s
            scale[channels] = s * (self.one + scale[channels]) - self.one

    def _weights(self) -> Sequence[Tensor]:
        return () if self.weight is None else self.weight.split(self.weight.shape[1])


def gains_of(modulation: nn.Module | None, norm: nn.LayerNorm, random: Generator) -> Gains:
    if isinstance(modulation, nn.Linear):
        fill(modulation, 0.6, random)
        return Gains(modulation.bias.split(modulation.in_features), 1, modulation.weight)
    return Gains([norm.bias, norm.weight], 0)


def fill_beacon(model: DiT, sinks: Tensor, channel: int, random: Generator) -> None:
    """Two condition tokens among T patches: a constant in one channel of theirs draws half of all attention to them."""
    spec, value = model.spec, 0.5 * math.sqrt(8)  # of that channel after a norm that the sinks rule
    constants = torch.zeros(spec.hidden)
    constants[sinks[::2]], constants[sinks[1::2]], constants[channel] = SINK, -SINK, SINK
    fixed = constants != 0
    for embedder in cast(list[Embedder], model.embedders):
        last, table = cast(nn.Linear, embedder.time[2]), embedder.label.weight
        last.weight[fixed], last.bias[fixed], table[:, fixed] = 0, constants[fixed], constants[fixed]
    bonus = math.log(spec.tokens / 2) + LOGITS**2 / 2
    for block in cast(list[Block], model.blocks):
        block.norm1.weight[channel], block.norm1.bias[channel] = 0.5, 0
        queries, keys, values = block.attn.qkv.weight.split(spec.hidden)
        direction = torch.randn(spec.hidden, generator=random)
        queries[:, channel], keys[:, channel], values[:, channel] = 0, direction, 0
        block.attn.qkv.bias[: spec.hidden] += bonus / (value * math.sqrt(spec.hidden / spec.heads)) * direction


def fill(layer: nn.Linear | nn.Conv2d, gain: float, random: Generator) -> None:
    """Unit inputs give outputs of deviation `gain`, plus a small bias."""
    layer.weight.normal_(0, gain / math.sqrt(layer.weight[0].numel()), generator=random)
    if layer.bias is not None:
        layer.bias.normal_(0, 0.05 * gain, generator=random)


def fill_embedder(embedder: Embedder, spec: ModelSpec, span: float, random: Generator) -> None:
    first, _, second = cast(list[nn.Linear], embedder.time)
    fill(first, 1.0, random)
    fill(second, 3.0, random)
    # Fast frequencies are damped, so the prediction is smooth in t, and 5 % of the range on it is still another one.
    frequencies = embedder.frequencies.copy_(timestep_frequencies(spec.frequency_shift))  # (128,)
    damping = 1 / (1 + SMOOTH * span * frequencies)
    damping *= math.sqrt(2 * len(damping)) / damping.norm()
    first.weight *= damping.repeat(2)
    first.weight[:, len(damping) :] *= max(1.0, SHORT / span)
    embedder.label.weight.normal_(generator=random)


def outliers(channels: Tensor, random: Generator) -> Tensor:
    return torch.empty(len(channels)).uniform_(8, 20, generator=random)


def outlying_values(made: nn.Linear, proj: nn.Linear, channels: Tensor, random: Generator) -> None:
    """Values s times as large, and the columns that read them / s: the same function. Values are made last."""
    s = outliers(channels, random)
    rows = made.out_features - proj.in_features + channels
    made.weight[rows] *= s[:, None]
    made.bias[rows] *= s
    proj.weight[:, channels] /= s


def fill_patches(
    patches: nn.Conv2d, positions: Tensor, grid: tuple[int, int], sinks: Tensor, random: Generator
) -> Tensor:
    """Fill in patches whose tokens are orthogonal to positions and mean; return a basis of these three."""
    width = patches.out_channels
    columns, rows = positions[0, : grid[1]].clone(), positions[0, :: grid[1]].clone()
    columns[:, width // 2 :], rows[:, : width // 2] = 0, 0
    free = torch.randn(width, patches.weight[0].numel(), generator=random)
    known = torch.cat([torch.ones(width, 1), columns.T, rows.T, free], dim=1)  # (D, 1 + w + h + C·p·p)
    known[sinks] = 0
    basis = torch.linalg.qr(known).Q
    latents = basis[:, 1 + sum(grid) :]  # (D, C·p·p)
    bias = torch.zeros(width)
    bias[sinks[::2]], bias[sinks[1::2]] = SINK, -SINK
    scale = LATENTS * math.sqrt(width / latents.shape[1])
    patches.load_state_dict({"weight": (scale * latents).view_as(patches.weight), "bias": bias})
    return basis


def fill_final(model: DiT, basis: Tensor, span: float, random: Generator) -> None:
    """Rows of eps: the patch embedding's inverse and noise; of the variance: noise; scaled as a probe measures."""
    spec, linear = model.spec, model.final.linear
    linear.bias.zero_()
    linear.weight.normal_(0, 1 / math.sqrt(spec.hidden), generator=random)
    linear.weight -= linear.weight @ basis @ basis.T  # hear the blocks alone
    inverse = torch.linalg.pinv(model.patches.weight.flatten(1)).unflatten(0, (spec.channels, spec.patch, spec.patch))

    latents = torch.randn(len(PROBES), *spec.latent_shape, generator=random).repeat(2, 1, 1, 1)
    labels = torch.randperm(spec.num_classes, generator=random)[: len(latents)]  # the second half: other labels
    activations: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, inputs: activations.append(inputs[0]))
    model(latents, span * torch.tensor(PROBES).repeat(2), labels)
    hook.remove()
    tokens = F.unfold(latents, spec.patch, stride=spec.patch).transpose(1, 2)  # (N, T, C·p·p)
    passed = activations[0] @ inverse.flatten(0, 2).T  # (N, T, C·p·p)
    inverse *= PASS * tokens.square().sum() / (passed * tokens).sum()
    change = torch.sub(*activations[0].chunk(2))  # what another label changes, (N/2, T, D)
    heard, leaked = F.linear(change, linear.weight), change @ inverse.flatten(0, 2).T
    noise = F.linear(activations[0], linear.weight).std()

    rows = linear.weight.unflatten(0, (spec.patch, spec.patch, -1))  # (p, q, C_out, D)
    wanted = ((LABEL * PASS) ** 2 - leaked.square().mean()).clamp(min=0)
    rows[:, :, : spec.channels] *= (wanted / heard.square().mean()).sqrt()
    rows[:, :, : spec.channels] += inverse.permute(1, 2, 0, 3)
    rows[:, :, spec.channels :] *= VARIANCE / noise


@torch.no_grad()
def synthetic_vae(seed: int, config: Mapping[str, Any] = SD_VAE) -> AutoencoderKL:
    """Stable Diffusion's KL-f8, or another, with weights that decode latents to blotches of colour around grey."""
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    vae.to_empty(device="cpu").eval().requires_grad_(False)
    random = Generator().manual_seed(seed)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fill(module, 1.0, random)
        elif isinstance(module, nn.GroupNorm):
            module.weight.fill_(1)
            module.bias.zero_()
    latents = torch.randn(2, vae.config.latent_channels, 16, 16, generator=random) / vae.config.scaling_factor
    images = vae.decode(latents).sample  # (2, 3, 128, 128)
    last = vae.decoder.conv_out
    last.weight *= 0.5 / images.std()  # pictures are image / 2 + 0.5: deviation 0.25 around 0.5
    last.bias -= images.mean((0, 2, 3))
    last.bias *= 0.5 / images.std()
    return vae
