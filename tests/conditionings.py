"""A small network of every conditioning with sensitive weights, as a checkpoint that `dit-export build` reads."""

from __future__ import annotations

from pathlib import Path

import torch

from dit_export.checkpoints import keys
from dit_export.checkpoints.synthetic import synthetic_dit
from dit_export.networks.dit import DiT
from dit_export.networks.spec import CONDITIONINGS, ModelSpec, with_conditioning

CLASSES = ModelSpec(depth=3, hidden=192, heads=3, patch=2, latent_size=8, num_classes=10)
WAYS = tuple(CONDITIONINGS)


def spec_of(conditioning: str) -> ModelSpec:
    return with_conditioning(CLASSES, conditioning)


def save(conditioning: str, folder: Path) -> tuple[DiT, list[str]]:
    """Write the network; return it, and the options of `dit-export build` that read it from `folder`."""
    model = synthetic_dit(spec_of(conditioning), 0)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(keys.write(model, keys.META), folder / "dit.pt")
    return model, ["--checkpoint", str(folder / "dit.pt"), "--heads", str(CLASSES.heads), "--latents-only"]
