"""Made-up weights that behave like a trained DiT's: every input matters, sampling stays bounded, outliers stand out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn

from dit_export.models.dit import DiT, Embedder, position_table, timestep_frequencies
from dit_export.spec import ModelSpec

# The prediction is PASS·x + NOISE·(what the network adds), of deviation about 1. With eps = a·x, DDIM takes x_T to
# 157^(1-a)·2^-a times itself: a near 1 keeps ten guided steps bounded, as a trained model's correlation with x does.
LATENTS = 2.0
CONSTANT = 4.0
PASS = 1.05
NOISE = 0.35
VARIANCE = 0.4  # deviation of the learned-variance channels, which live in about [-1, 1]
SMOOTH = 40.0  # timesteps over which the prediction changes
PROBES = (40.0, 350.0, 900.0)  # timesteps at which the final layer's scale is measured
SD_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}


@torch.no_grad()
def synthetic_dit(spec: ModelSpec, seed: int) -> DiT:
    """The same weights for the same spec and seed; one copy in memory."""
    with torch.device("meta"):
        model = DiT(spec)
    model.to_empty(device="cpu").eval().requires_grad_(False)
    random = Generator().manual_seed(seed)
    model.positions.copy_(position_table(spec.hidden, model.grid))
    basis = fill_patches(model, random)
    for embedder in model.embedders:
        fill_embedder(embedder, spec, random)
    count = max(1, min(4, spec.hidden // 96))
    shared = torch.randperm(spec.hidden, generator=random)[: count // 2]
    for block in model.blocks:
        fill_modulation(block.modulation, (0.3, 0.25, 0.3), random)
        fill(block.attn.qkv, 1.0, random)
        block.attn.qkv.weight[: 2 * spec.hidden] *= 1.5  # attention that selects: logits of deviation about 2
        for linear in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            fill(linear, 1.0, random)
        own = torch.randperm(spec.hidden, generator=random)
        inputs, values = torch.cat([shared, own[: count - len(shared)]]), own[-max(1, count // 2) :]
        outlying_inputs(block.modulation, 0, block.attn.qkv, inputs, random)
        outlying_inputs(block.modulation, 3, block.mlp.fc1, inputs, random)
        outlying_values(block.attn.qkv, block.attn.proj, values, random)
    fill_modulation(model.final.modulation, (0.4, 0.2), random)
    fill_final(model, basis, random)
    return model


def fill(layer: nn.Linear | nn.Conv2d, gain: float, random: Generator) -> None:
    """Unit inputs give outputs of deviation `gain`, plus a small bias."""
    layer.weight.normal_(0, gain / math.sqrt(layer.weight[0].numel()), generator=random)
    if layer.bias is not None:
        layer.bias.normal_(0, 0.05 * gain, generator=random)


def fill_embedder(embedder: Embedder, spec: ModelSpec, random: Generator) -> None:
    first, second = embedder.time[0], embedder.time[2]
    fill(first, 1.0, random)
    fill(second, 2.0, random)
    # Fast frequencies are damped, so the prediction is smooth in t, and t + 50 is still another timestep.
    frequencies = timestep_frequencies(torch.ones(1), spec.frequency_shift)[0, : first.in_features // 2].acos()  # (128,)
    damping = 1 / (1 + SMOOTH * frequencies)
    damping *= math.sqrt(2 * len(damping)) / damping.norm()
    first.weight *= damping.repeat(2)
    embedder.label.weight.normal_(generator=random)


def fill_modulation(linear: nn.Linear, deviations: tuple[float, ...], random: Generator) -> None:
    """Rows of (shift, scale, gate) with these deviations, over and over; half of it depends on the condition."""
    fill(linear, 1.0, random)
    linear.bias *= 12
    rows = torch.tensor(deviations).repeat(linear.out_features // linear.in_features // len(deviations))
    linear.weight *= rows.repeat_interleave(linear.in_features)[:, None] * 0.6
    linear.bias *= rows.repeat_interleave(linear.in_features)


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


def fill_patches(model: DiT, random: Generator) -> Tensor:
    """Latents, a constant and the positions in directions orthogonal to each other; returns these directions."""
    width, grid = model.spec.hidden, model.grid
    columns, rows = model.positions[0].unflatten(0, (grid, grid))[0].clone(), model.positions[0, ::grid].clone()
    columns[:, width // 2 :], rows[:, : width // 2] = 0, 0
    free = torch.randn(width, 1 + model.patches.weight[0].numel(), generator=random)
    basis = torch.linalg.qr(torch.cat([torch.ones(width, 1), columns.T, rows.T, free], dim=1)).Q  # (D, 2 + 2·grid + C·p·p)
    constant, latents = basis[:, 1 + 2 * grid], basis[:, 2 + 2 * grid :]
    model.patches.bias.copy_(constant * CONSTANT * math.sqrt(width))
    model.patches.weight.copy_((latents * LATENTS * math.sqrt(width / latents.shape[1])).view_as(model.patches.weight))
    return basis


def fill_final(model: DiT, basis: Tensor, random: Generator) -> None:
    """eps rows: the patch embedding's pseudo-inverse plus noise; variance rows: noise; scaled as measured on a probe."""
    spec, linear = model.spec, model.final.linear
    linear.bias.zero_()
    linear.weight.normal_(0, 1 / math.sqrt(spec.hidden), generator=random)
    linear.weight -= linear.weight @ basis @ basis.T  # hear the blocks alone
    inverse = torch.linalg.pinv(model.patches.weight.flatten(1)).unflatten(0, (spec.channels, spec.patch, spec.patch))

    latents = torch.randn(len(PROBES), spec.channels, spec.latent_size, spec.latent_size, generator=random)
    labels = torch.randint(spec.num_classes + 1, (len(PROBES),), generator=random)
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(latents, torch.tensor(PROBES), labels)
    hook.remove()
    tokens = F.unfold(latents, spec.patch, stride=spec.patch).transpose(1, 2)  # (N, T, C·p·p)
    passed = seen[0] @ inverse.flatten(0, 2).T  # (N, T, C·p·p)
    inverse *= PASS * (tokens * tokens).sum() / (passed * tokens).sum()
    noise = F.linear(seen[0], linear.weight).std()

    rows = linear.weight.unflatten(0, (spec.patch, spec.patch, -1))  # (p, q, C_out, D)
    rows[:, :, : spec.channels] *= NOISE / noise
    rows[:, :, : spec.channels] += inverse.permute(1, 2, 0, 3)
    rows[:, :, spec.channels :] *= VARIANCE / noise


@torch.no_grad()
def synthetic_vae(seed: int) -> AutoencoderKL:
    """Stable Diffusion's KL-f8 with weights that decode latents to blotches of colour around grey."""
    with torch.device("meta"):
        vae = AutoencoderKL(**SD_VAE)
    vae.to_empty(device="cpu").eval().requires_grad_(False)
    random = Generator().manual_seed(seed)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fill(module, 1.0, random)
        elif isinstance(module, nn.GroupNorm):
            module.weight.fill_(1)
            module.bias.zero_()
    latents = torch.randn(2, 4, 16, 16, generator=random) / vae.config.scaling_factor
    images = vae.decode(latents).sample  # (2, 3, 128, 128)
    last = vae.decoder.conv_out
    last.weight *= 0.5 / images.std()  # pictures are image / 2 + 0.5: deviation 0.25 around 0.5
    last.bias -= images.mean((0, 2, 3))
    last.bias *= 0.5 / images.std()
    return vae
