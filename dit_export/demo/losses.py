"""Training losses of the three models; every random number comes from the step's own generator."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from dit_export.demo.data import Samples
from dit_export.demo.loop import Loss
from dit_export.demo.vit import ViT
from dit_export.networks.dit import DiT

STEPS = 1000
KL_WEIGHT = 5e-4  # per latent: small enough for sharp edges, large enough for a latent space without holes
DROPOUT = 0.1  # of conditions


def alphas_bar() -> Tensor:
    """The paper's schedule: 1000 linear betas from 1e-4 to 0.02; float64."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64), 0)


def pictures(samples: Samples, indices: Tensor) -> Tensor:
    """(N, 3, H, W) in [-1, 1]."""
    images = torch.from_numpy(samples.images[indices.numpy()]).permute(0, 3, 1, 2)
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def choose(samples: Samples, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(len(samples.labels), (count,), generator=generator)


def autoencoder_loss(samples: Samples, count: int) -> Loss[AutoencoderKL]:
    """Mean |error| for sharp edges, mean error² for the shape's colour early on, KL to the unit Gaussian a latent."""

    def loss(vae: AutoencoderKL, generator: torch.Generator) -> Tensor:
        images = pictures(samples, choose(samples, count, generator))
        posterior = vae.encode(images).latent_dist
        latents = drawn(torch.cat([posterior.mean, posterior.std], dim=1), generator)
        error = vae.decode(latents).sample - images
        kl = posterior.kl().mean() / latents[0].numel()
        return error.abs().mean() + 4 * error.square().mean() + KL_WEIGHT * kl

    return loss


def drawn(moments: Tensor, generator: torch.Generator) -> Tensor:
    """Latents from their means and deviations, (N, 2C, h, w)."""
    mean, std = moments.chunk(2, dim=1)
    return mean + std * torch.randn(mean.shape, generator=generator)


def judge_loss(samples: Samples, count: int) -> Loss[ViT]:
    """Cross-entropy on pictures that are blurred, noisy and re-toned a little, as decoded ones are."""

    def loss(judge: ViT, generator: torch.Generator) -> Tensor:
        indices = choose(samples, count, generator)
        images = pictures(samples, indices) / 2 + 0.5
        blur, noise, gain, bias = torch.rand(4, count, 1, 1, 1, generator=generator)
        images = torch.lerp(images, F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False), blur)
        images = (images - 0.5) * (0.9 + 0.2 * gain) + 0.45 + 0.1 * bias
        images = images + 0.06 * noise * torch.randn(images.shape, generator=generator)
        return F.cross_entropy(judge(images.clamp(0, 1)).logits, torch.from_numpy(samples.labels)[indices])

    return loss


def timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Their logit is normal, most between 100 and 800: shapes are decided there, and below is the encoder's noise."""
    return (STEPS * torch.sigmoid(1.2 * torch.randn(count, generator=generator) - 0.4)).long()


def diffusion_loss(moments: Tensor, count: int, **conditions: tuple[Tensor, float]) -> Loss[DiT]:
    """L_hybrid of Improved DDPM (Nichol & Dhariwal, arXiv 2102.09672, section 3.1).

    Mean squared error of epsilon, plus one term of the variational bound, KL(q(x_{t-1} | x_t, x_0) || p), in nats a
    latent; the bound moves the variance only, its mean is detached. At t = 0 the posterior's variance is that of t = 1,
    so the same formula stands for the likelihood term. A condition is all its rows, and the constant in place of those
    that are dropped.
    """
    bar = alphas_bar()
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    beta = 1 - bar / before
    posterior = beta * (1 - before) / (1 - bar)
    posterior[0] = posterior[1]
    # mean of p minus mean of q = (epsilon - prediction) * beta / sqrt(alpha (1 - bar))
    mean_share = (beta / torch.sqrt((1 - beta) * (1 - bar))).float()
    narrow, wide = posterior.log().float(), beta.log().float()
    signal, spread = bar.sqrt().float(), (1 - bar).sqrt().float()

    def at(table: Tensor, t: Tensor) -> Tensor:
        return table[t][:, None, None, None]

    def loss(dit: DiT, generator: torch.Generator) -> Tensor:
        indices = torch.randint(len(moments), (count,), generator=generator)
        latents = drawn(moments[indices], generator)
        t = timesteps(count, generator)
        epsilon = torch.randn(latents.shape, generator=generator)
        dropped = torch.rand(count, generator=generator) < DROPOUT
        ports = {name: without(rows[indices], dropped, null) for name, (rows, null) in conditions.items()}
        prediction, v = dit(at(signal, t) * latents + at(spread, t) * epsilon, t.float(), **ports).chunk(2, dim=1)
        log_p = torch.lerp(at(narrow, t).expand_as(v), at(wide, t).expand_as(v), (v + 1) / 2)
        gap = (epsilon - prediction.detach()) * at(mean_share, t)
        log_q = at(narrow, t)
        bound = 0.5 * (log_p - log_q - 1 + torch.exp(log_q - log_p) + gap.square() * torch.exp(-log_p))
        return (epsilon - prediction).square().mean() + bound.mean()

    return loss


def without(rows: Tensor, dropped: Tensor, null: float) -> Tensor:
    """Put the constant in the place of dropped rows."""
    return torch.where(dropped.view(-1, *[1] * (rows.ndim - 1)), torch.tensor(null, dtype=rows.dtype), rows)


@torch.no_grad()
def encode(vae: AutoencoderKL, samples: Samples) -> Tensor:
    """Means and standard deviations of all samples' latents, (N, 2C, h, w), not yet scaled."""
    rows = []
    for chunk in torch.from_numpy(np.arange(len(samples.labels))).split(250):
        posterior = vae.encode(pictures(samples, chunk)).latent_dist
        rows.append(torch.cat([posterior.mean, posterior.std], dim=1).contiguous())
    return torch.cat(rows)
