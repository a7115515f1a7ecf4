"""A small network of every conditioning with sensitive weights, as a checkpoint that `dit-export build` reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from dit_export.checkpoints import keys
from dit_export.checkpoints.synthetic import synthetic_dit
from dit_export.networks.dit import DiT
from dit_export.networks.spec import CONDITIONINGS, ModelSpec, conditioned

CLASSES = ModelSpec(depth=3, hidden=192, heads=3, patch=2, latent_size=8, num_classes=10)
CAPTIONS = replace(CLASSES, guided_channels=4, unguided_up_to_one=True, position_span=4.0, caption_channels=32)
WAYS = tuple(CONDITIONINGS)


def spec_of(conditioning: str) -> ModelSpec:
    return conditioned(CAPTIONS if CONDITIONINGS[conditioning].captioned else CLASSES, conditioning)


def save(conditioning: str, folder: Path) -> tuple[DiT, list[str]]:
    """The network, and the options of `dit-export build` that read it from `folder`."""
    spec = spec_of(conditioning)
    model = synthetic_dit(spec, 0)
    folder.mkdir(parents=True, exist_ok=True)
    if not spec.by.captioned:
        torch.save(keys.write(model, keys.META), folder / "dit.pt")
        return model, ["--checkpoint", str(folder / "dit.pt"), "--heads", str(spec.heads), "--latents-only"]
    save_file(keys.write(model, keys.PIXART), folder / "diffusion_pytorch_model.safetensors")
    config = {
        "_class_name": "PixArtTransformer2DModel",
        "num_attention_heads": spec.heads,
        "attention_head_dim": spec.hidden // spec.heads,
        "in_channels": spec.channels,
        "out_channels": spec.out_channels,
        "num_layers": spec.depth,
        "cross_attention_dim": spec.hidden,
        "sample_size": spec.latent_size,
        "patch_size": spec.patch,
        "caption_channels": spec.caption_channels,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model, ["--checkpoint", str(folder), "--latents-only"]
