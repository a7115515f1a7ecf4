"""The VAE whose decoder turns latents into pictures: diffusers' AutoencoderKL from a folder or the hub."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from dit_export.checkpoints.diffusers import read_config
from dit_export.checkpoints.files import check, find_weights, read_weights
from dit_runtime.errors import UsageError

# Attention layers in files from before diffusers 0.16, as Stable Diffusion's VAEs on the hub still are.
OLDER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_vae(folder: Path, channels: int) -> tuple[AutoencoderKL, list[Path]]:
    """`folder` is the VAE's own, or a pipeline's with vae/ in it."""
    if (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    where = folder / "config.json"
    if not where.is_file():
        raise UsageError(f"{folder}: holds neither config.json nor vae/config.json: pass --vae, or --latents-only")
    config = read_config(folder, "AutoencoderKL")
    stages = len(config["block_out_channels"])
    for field, got, expected in (
        ("latent_channels", config["latent_channels"], channels),
        ("out_channels", config["out_channels"], 3),
        ("block_out_channels", f"{stages} stages", "4 stages"),  # each but one doubles the side: 8 pixels a latent
        ("latents_mean", config["latents_mean"], None),
        ("latents_std", config["latents_std"], None),
    ):
        if got != expected:
            raise UsageError(f"{where}: {field} is {got}, expected {expected}")
    try:
        with torch.device("meta"):
            vae = AutoencoderKL(**config)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: AutoencoderKL refuses it: {error}") from None

    files = find_weights(folder)
    older = re.compile(rf"(?<=\.attentions\.0\.)({'|'.join(OLDER_NAMES)})(?=\.)")
    state = {
        older.sub(lambda match: OLDER_NAMES[match[1]], name): tensor for name, tensor in read_weights(files).items()
    }
    check(state, {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}, str(folder))
    vae.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return vae.eval().requires_grad_(False), files
