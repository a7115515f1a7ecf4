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


def family(name: str, size: tuple[int, int], tokens: int | None = None, **config: Any) -> Network:
    """Return a class of diffusers; fields that `config` leaves out have the class's defaults."""
    return without_weights(family_network(build_module(name, config, name), size, tokens))


def dit(name: str) -> Network:
    return without_weights(dit_network(on_meta(DiT, MODELS[name])))


SQUARE = (128, 128)  # latents of 1024 px
SD3 = partial(family, "SD3Transformer2DModel", SQUARE, attention_head_dim=64, joint_attention_dim=4096)
SIGMA = {"caption_channels": 4096, "use_additional_conditions": False, "interpolation_scale": 2}

NETWORKS: dict[str, Callable[[], Network]] = {
    "DiT-XL/2, 256 px": partial(dit, "XL/2"),
    "PixArt-Sigma, 1024 px": partial(family, "PixArtTransformer2DModel", SQUARE, 300, **SIGMA),
    "SD3-medium, 1024 px": partial(SD3, num_attention_heads=24, num_layers=24, caption_projection_dim=1536),
    "SD3.5-medium, 1024 px": partial(
        SD3,
        num_attention_heads=24,
        num_layers=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ),
    "SD3.5-large, 1024 px": partial(
        SD3,
        num_attention_heads=38,
        num_layers=38,
        caption_projection_dim=2432,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    ),
}
