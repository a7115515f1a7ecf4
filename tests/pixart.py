"""A small PixArt-alpha as diffusers writes it, and the bundle that `dit-export build` makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel

from dit_export.cli import main

WIDTH, HEADS, SIDE, CHANNELS, TOKENS = 96, 4, 16, 32, 120


def save(folder: Path, **config: object) -> PixArtTransformer2DModel:
    """A pipeline without its text encoder, random weights to which every input matters."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        num_layers=3,
        cross_attention_dim=WIDTH,
        caption_channels=CHANNELS,
        **{"sample_size": SIDE} | config,
    ).eval()
    basis = torch.linalg.qr(torch.randn(WIDTH, 16))[0]
    with torch.no_grad():
        transformer.pos_embed.proj.weight.copy_(4 * basis.view(WIDTH, 4, 2, 2))
        transformer.adaln_single.linear.weight.normal_(std=0.03)
        transformer.proj_out.weight.normal_(std=0.02)
        latents = 0.15 * basis.view(WIDTH, 4, 2, 2).permute(2, 3, 1, 0)
        transformer.proj_out.weight.view(2, 2, 8, WIDTH)[:, :, :4] += latents
        for block in transformer.transformer_blocks:
            block.attn2.to_out[0].weight *= 4
    transformer.save_pretrained(folder / "transformer")
    small_vae().save_pretrained(folder / "vae")
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    return transformer


def small_vae(**config: object) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        **{"latent_channels": 4} | config,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 2  # pictures that use a good part of 0 to 255
    return vae


def build(checkpoint: Path, bundle: Path, *options: str) -> int:
    command = ["build", "--checkpoint", str(checkpoint), "--backend", "onnxruntime", "--max-batch", "2"]
    return main([*command, "-o", str(bundle), *options])
