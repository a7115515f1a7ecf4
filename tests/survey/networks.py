"""The transformers that people deploy, in their published shapes, without their weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from dit_export.checkpoints.diffusers import build_module
from dit_export.networks import Network
from dit_export.networks.dit import DiT, dit_network
from dit_export.networks.families import family_network
from dit_export.networks.spec import MODELS
from tests.weightless import on_meta, without_weights


def family(name: str, size: tuple[int, ...] | None = None, tokens: int | None = None, **config: Any) -> Network:
    """Return a class of diffusers; what is left out has the defaults of the class and of its pipeline."""
    return without_weights(family_network(build_module(name, config, name), size, tokens))


def dit(name: str) -> Network:
    return without_weights(dit_network(on_meta(DiT, MODELS[name])))


SQUARE = (128, 128)  # latents of 1024 px
SD3 = partial(family, "SD3Transformer2DModel", SQUARE, attention_head_dim=64, joint_attention_dim=4096)
MEDIUM = {"num_attention_heads": 24, "num_layers": 24, "caption_projection_dim": 1536}
LARGE = {"num_attention_heads": 38, "num_layers": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
DUAL = {"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}
SIGMA = {"caption_channels": 4096, "use_additional_conditions": False, "interpolation_scale": 2}
HUNYUAN = {"attention_head_dim": 88, "hidden_size": 1408, "num_layers": 40, "in_channels": 4, "patch_size": 2}
KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}

NETWORKS: dict[str, Callable[[], Network]] = {
    "DiT-XL/2, 256 px": partial(dit, "XL/2"),
    "PixArt-Sigma, 1024 px": partial(family, "PixArtTransformer2DModel", SQUARE, 300, **SIGMA),
    "SD3-medium, 1024 px": partial(SD3, **MEDIUM),
    "SD3.5-medium, 1024 px": partial(SD3, qk_norm="rms_norm", **MEDIUM, **DUAL),
    "SD3.5-large, 1024 px": partial(SD3, qk_norm="rms_norm", **LARGE),
    "Flux.1-dev, 1024 px": partial(family, "FluxTransformer2DModel", guidance_embeds=True),
    "Flux.2-klein-4B, 1024 px": partial(family, "Flux2Transformer2DModel", guidance_embeds=False, **KLEIN),
    "Chroma, 1024 px": partial(family, "ChromaTransformer2DModel"),
    "Qwen-Image, 1024 px": partial(family, "QwenImageTransformer2DModel", SQUARE),
    "Z-Image, 1024 px": partial(family, "ZImageTransformer2DModel"),
    "Lumina2, 1024 px": partial(family, "Lumina2Transformer2DModel", SQUARE, cap_feat_dim=2304),
    "Sana-1.6B, 1024 px": partial(family, "SanaTransformer2DModel"),
    "AuraFlow, 1024 px": partial(family, "AuraFlowTransformer2DModel", SQUARE, pos_embed_max_size=96**2),
    "Hunyuan-DiT 1.2, 1024 px": partial(
        family, "HunyuanDiT2DModel", SQUARE, **HUNYUAN, mlp_ratio=4.3637, use_style_cond_and_image_meta_size=False
    ),
    "LTX-2B, 768x512 px": partial(family, "LTXVideoTransformer3DModel"),
}
