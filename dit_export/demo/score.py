"""Scores of pictures: the judge's agreement with the requested class, and the Fréchet distance to held-out data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

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
    """The PyTorch reference: DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2) from seed to pictures.

    Float32 network, float64 state; timesteps evenly spaced, sigma zero at the end, as diffusers' scheduler has them.
    """
    spec = demo.dit.spec
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), *spec.latent_shape, generator=generator)
    times = np.linspace(0, STEPS - 1, steps + 1).round()[:0:-1]
    bar = alphas_bar()[times.astype(np.int64)].numpy()
    alpha, sigma = [*np.sqrt(bar), 1.0], [*np.sqrt(1 - bar), 0.0]
    logsnr = np.log(np.sqrt(bar) / np.sqrt(1 - bar))
    for rows, y in zip(noise.split(batch), torch.tensor(labels).split(batch), strict=True):
        x, clean_before = rows.double(), None
        for i, t in enumerate(times):
            epsilon = guided(demo, x.float(), float(t), y, guidance).double()
            clean = slope = (x - sigma[i] * epsilon) / alpha[i]
            if i + 1 == steps:
                break
            h = logsnr[i + 1] - logsnr[i]
            if clean_before is not None:
                slope = clean + (clean - clean_before) * h / (2 * (logsnr[i] - logsnr[i - 1]))
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * slope
            clean_before = clean
        yield decode(demo, clean.float())


def guided(demo: Demo, x: torch.Tensor, t: float, labels: torch.Tensor, guidance: float) -> torch.Tensor:
    """eps_null + guidance * (eps_y - eps_null); one pass where guidance is 1 or less."""
    spec = demo.dit.spec
    both = guidance > 1
    y = torch.cat([labels, torch.full_like(labels, spec.null_label)]) if both else labels
    out = demo.dit(torch.cat([x, x]) if both else x, torch.full((len(y),), t), y)[:, : spec.channels]
    if not both:
        return out
    asked, null = out.chunk(2)
    return null + guidance * (asked - null)


@torch.no_grad()
def decode(demo: Demo, latents: torch.Tensor) -> NDArray[np.uint8]:
    """uint8 (N, H, W, 3), rounded half to even."""
    images = demo.vae.decode(latents / demo.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
