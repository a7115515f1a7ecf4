"""Scores of pictures: the judge's agreement with the requested class, and the Fréchet distance to held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from dit_export.demo import data
from dit_export.demo.losses import STEPS, alphas_bar
from dit_export.demo.store import Demo
from dit_export.demo.vit import ViT
from dit_export.verify import distribution
from dit_export.verify.distribution import Floats, Interval, frechet_interval, wilson

REFERENCE = 5_000  # held-out pictures that a Fréchet distance is taken to


@dataclass(frozen=True)
class Score:
    pictures: int
    accuracy: Interval
    frechet: Interval


def score(pictures: Iterable[NDArray[np.uint8]], labels: Sequence[int], judge: ViT, reference: Floats) -> Score:
    """Judge batches of uint8 (N, H, W, 3) that were asked for by `labels`, in the same order."""
    named, features = look(judge, pictures)
    hits = int((named == np.asarray(labels)).sum())
    return Score(len(named), wilson(hits, len(named)), frechet_interval(features, reference))


@torch.no_grad()
def look(judge: ViT, pictures: Iterable[NDArray[np.uint8]]) -> tuple[NDArray[np.int64], Floats]:
    """The class that the judge sees in each picture, (N,), and its features, (N, D)."""
    named, features = [], []
    for images in pictures:
        logits, rows = judge(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        named.append(logits.argmax(1).numpy())
        features.append(rows.double().numpy())
    return np.concatenate(named), np.concatenate(features)


def reference_features(judge: ViT, count: int = REFERENCE) -> Floats:
    """Return the features of held-out pictures, balanced over the classes."""
    images = data.pool(data.HELD_OUT, count).images
    return look(judge, np.split(images, range(250, count, 250)))[1]


def balanced_labels(count: int) -> list[int]:
    return distribution.balanced_labels(count, len(data.CLASSES)).tolist()


@torch.no_grad()
def draw(
    demo: Demo, labels: Sequence[int], steps: int = 25, guidance: float = 4.0, seed: int = 0, batch: int = 50
) -> Iterator[NDArray[np.uint8]]:
    """Draw pictures of these classes with PyTorch, the reference of the bundles."""
    noise = noise_of(demo, len(labels), seed)
    for rows, y in zip(noise.split(batch), torch.tensor(labels).split(batch), strict=True):
        yield decode(demo, dpm(rows, steps, partial(guided, demo, labels=y, guidance=guidance)))


@torch.no_grad()
def enlarge(
    demo: Demo, low: torch.Tensor, steps: int = 25, seed: int = 0, batch: int = 50
) -> Iterator[NDArray[np.uint8]]:
    """Draw pictures from the latents of low-resolution ones with PyTorch; the network is one that takes them."""
    noise = noise_of(demo, len(low), seed)
    for rows, condition in zip(noise.split(batch), low.split(batch), strict=True):
        yield decode(demo, dpm(rows, steps, partial(epsilon, demo, low=condition)))


def noise_of(demo: Demo, count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, *demo.dit.spec.latent_shape, generator=torch.Generator().manual_seed(seed))


def dpm(noise: torch.Tensor, steps: int, predict: Callable[[torch.Tensor, float], torch.Tensor]) -> torch.Tensor:
    """Solve from noise to latents: DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2).

    Float32 network, float64 state; timesteps evenly spaced, sigma zero at the end, as diffusers' scheduler has them.
    """
    times = np.linspace(0, STEPS - 1, steps + 1).round()[:0:-1]
    bar = alphas_bar()[times.astype(np.int64)].numpy()
    alpha, sigma = [*np.sqrt(bar), 1.0], [*np.sqrt(1 - bar), 0.0]
    logsnr = np.log(np.sqrt(bar) / np.sqrt(1 - bar))
    x, clean_before = noise.double(), None
    for i, t in enumerate(times):
        clean = slope = (x - sigma[i] * predict(x.float(), float(t)).double()) / alpha[i]
        if i + 1 == steps:
            break
        h = logsnr[i + 1] - logsnr[i]
        if clean_before is not None:
            slope = clean + (clean - clean_before) * h / (2 * (logsnr[i] - logsnr[i - 1]))
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * slope
        clean_before = clean
    return clean.float()


def guided(demo: Demo, x: torch.Tensor, t: float, labels: torch.Tensor, guidance: float) -> torch.Tensor:
    """eps_null + guidance * (eps_y - eps_null); one pass where guidance is 1 or less."""
    spec = demo.dit.spec
    both = guidance > 1
    y = torch.cat([labels, torch.full_like(labels, spec.null_label)]) if both else labels
    out = epsilon(demo, torch.cat([x, x]) if both else x, t, labels=y)
    if not both:
        return out
    asked, null = out.chunk(2)
    return null + guidance * (asked - null)


def epsilon(demo: Demo, x: torch.Tensor, t: float, **conditions: torch.Tensor) -> torch.Tensor:
    return demo.dit(x, torch.full((len(x),), t), **conditions)[:, : demo.dit.spec.channels]


@torch.no_grad()
def decode(demo: Demo, latents: torch.Tensor) -> NDArray[np.uint8]:
    """uint8 (N, H, W, 3), rounded half to even."""
    images = demo.vae.decode(latents / demo.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
