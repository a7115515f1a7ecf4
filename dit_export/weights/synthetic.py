"""Made-up weights that behave like a trained DiT's: every input matters, sampling stays bounded, outliers stand out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn

from dit_export.models.dit import Block, DiT, Embedder, position_table, timestep_frequencies
from dit_export.spec import ModelSpec

# The prediction is PASS·x plus what the blocks add. With eps = a·x + n, DDIM's latents grow by n per e-fold of the
# noise level and shrink by a - 1: a little over 1 keeps ten guided steps bounded, as a trained model's does.
PASS = 1.2
LABEL = 0.17  # relative distance of the predictions for two labels
LATENTS = 1.25  # deviation of the latents in the residual stream
SINK = 20.0  # the constant in an eighth of its channels: it rules LayerNorm's divisor, so that the rest is linear in x
GAIN = 5.0  # mean of 1 + scale, which undoes that division
LEAK = 0.6  # what the blocks write into the latents' own directions, in the same measure for every size
VARIANCE = 0.4  # deviation of the learned-variance channels, which live in about [-1, 1]
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
    positions = position_table(spec.hidden, model.grid)
    model.load_state_dict({"positions": positions}, strict=False)
    sinks, others = torch.randperm(spec.hidden, generator=random).tensor_split([spec.hidden // 8])
    basis = fill_patches(model.patches, positions, sinks, random)
    for embedder in cast(list[Embedder], model.embedders):
        fill_embedder(embedder, spec, span, random)
    output = min(0.5, LEAK * math.sqrt(spec.hidden / model.patches.weight[0].numel() / spec.depth))
    for block in cast(list[Block], model.blocks):
        fill_modulation(block.modulation, (0.5, 0.5, 0.4), sinks, random)
        fill(block.attn.qkv, 1.0, random)
        block.attn.qkv.weight[: 2 * spec.hidden] *= 1.5  # attention that selects: logits of deviation about 2
        fill(block.mlp.fc1, 1.0, random)
        for linear in (block.attn.proj, block.mlp.fc2):
            fill(linear, output, random)
        own = others[torch.randperm(len(others), generator=random)]
        channels = torch.cat([others[: OUTLIERS // 2], own[: OUTLIERS // 2]]).unique()
        outlying_inputs(block.modulation, 0, block.attn.qkv, channels, random)
        outlying_inputs(block.modulation, 3, block.mlp.fc1, channels, random)
        outlying_values(block.attn.qkv, block.attn.proj, own[-OUTLIERS // 2 :], random)
    fill_modulation(model.final.modulation, (0.05, 0.25), sinks, random)
    fill_final(model, basis, span, random)
    return model


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
    frequencies = timestep_frequencies(spec.frequency_shift)  # (128,)
    damping = 1 / (1 + SMOOTH * span * frequencies)
    damping *= math.sqrt(2 * len(damping)) / damping.norm()
    first.weight *= damping.repeat(2)
    first.weight[:, len(damping) :] *= max(1.0, SHORT / span)
    embedder.label.weight.normal_(generator=random)


def fill_modulation(linear: nn.Linear, deviations: tuple[float, ...], sinks: Tensor, random: Generator) -> None:
    """(shift, scale, gate) with these deviations, once or twice over; sink channels are muted: gain and shift 0."""
    fill(linear, 0.6, random)
    linear.bias.normal_(0, 0.6, generator=random)
    chunks = zip(linear.weight.split(linear.in_features), linear.bias.split(linear.in_features), strict=True)
    for index, (weight, bias) in enumerate(chunks):
        kind = index % min(3, len(deviations))
        weight *= deviations[kind]
        bias *= deviations[kind]
        if kind == 1:
            bias += GAIN - 1
        if kind < 2:
            weight[sinks], bias[sinks] = 0, -float(kind)


def outliers(channels: Tensor, random: Generator) -> Tensor:
    return torch.empty(len(channels)).uniform_(8, 20, generator=random)


def outlying_inputs(modulation: nn.Linear, first: int, layer: nn.Linear, channels: Tensor, random: Generator) -> None:
    """gain = s·(1 + scale), shift·s and the layer's columns / s: the same function of 8 to 20 times larger inputs."""
    s = outliers(channels, random)
    width = layer.in_features
    shift, scale = first * width + channels, (first + 1) * width + channels
    modulation.weight[shift] *= s[:, None]
    modulation.weight[scale] *= s[:, None]
    modulation.bias[shift] *= s
    modulation.bias[scale] = s * (1 + modulation.bias[scale]) - 1
    layer.weight[:, channels] /= s


def outlying_values(qkv: nn.Linear, proj: nn.Linear, channels: Tensor, random: Generator) -> None:
    s = outliers(channels, random)
    rows = 2 * proj.in_features + channels
    qkv.weight[rows] *= s[:, None]
    qkv.bias[rows] *= s
    proj.weight[:, channels] /= s


def fill_patches(patches: nn.Conv2d, positions: Tensor, sinks: Tensor, random: Generator) -> Tensor:
    """Latents in directions orthogonal to the positions and to what centring removes; returns all of these."""
    width, grid = patches.out_channels, math.isqrt(positions.shape[1])
    columns, rows = positions[0, :grid].clone(), positions[0, ::grid].clone()
    columns[:, width // 2 :], rows[:, : width // 2] = 0, 0
    free = torch.randn(width, patches.weight[0].numel(), generator=random)
    known = torch.cat([torch.ones(width, 1), columns.T, rows.T, free], dim=1)  # (D, 1 + 2·grid + C·p·p)
    known[sinks] = 0
    basis = torch.linalg.qr(known).Q
    latents = basis[:, 1 + 2 * grid :]  # (D, C·p·p)
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

    shape = (len(PROBES), spec.channels, spec.latent_size, spec.latent_size)
    latents = torch.randn(shape, generator=random).repeat(2, 1, 1, 1)
    labels = torch.randperm(spec.num_classes, generator=random)[: len(latents)]  # the second half: other labels
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(latents, span * torch.tensor(PROBES).repeat(2), labels)
    hook.remove()
    tokens = F.unfold(latents, spec.patch, stride=spec.patch).transpose(1, 2)  # (N, T, C·p·p)
    passed = seen[0] @ inverse.flatten(0, 2).T  # (N, T, C·p·p)
    inverse *= PASS * tokens.square().sum() / (passed * tokens).sum()
    change = torch.sub(*seen[0].chunk(2))  # what another label changes, (N/2, T, D)
    heard, leaked = F.linear(change, linear.weight), change @ inverse.flatten(0, 2).T
    noise = F.linear(seen[0], linear.weight).std()

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
