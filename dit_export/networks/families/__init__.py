"""Transformers of diffusers as Networks: a small file a class, found by the `_class_name` of its config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dit_export.networks import Network
from dit_export.networks.families.auraflow import AURAFLOW
from dit_export.networks.families.chroma import CHROMA
from dit_export.networks.families.cogview4 import COGVIEW4
from dit_export.networks.families.flux import FLUX
from dit_export.networks.families.flux2 import FLUX2
from dit_export.networks.families.hunyuandit import HUNYUAN_DIT
from dit_export.networks.families.ltx import LTX
from dit_export.networks.families.lumina2 import LUMINA2
from dit_export.networks.families.pixart import PIXART
from dit_export.networks.families.qwenimage import QWEN_IMAGE
from dit_export.networks.families.sana import SANA
from dit_export.networks.families.sd3 import SD3
from dit_export.networks.families.zimage import Z_IMAGE
from dit_export.recipe import resolution_name
from dit_runtime.errors import UsageError, nearest

_ALL = (AURAFLOW, CHROMA, COGVIEW4, FLUX, FLUX2, HUNYUAN_DIT, LTX, LUMINA2, PIXART, QWEN_IMAGE, SANA, SD3, Z_IMAGE)
FAMILIES = {family.name: family for family in _ALL}


def family_network(transformer: Any, size: tuple[int, ...] | None = None, tokens: int | None = None) -> Network:
    """State the ports of a live transformer of diffusers.

    `size` is (H, W) of the latents, of videos (F, H, W), by default the trained one; `tokens` is how many a caption
    has, by default as many as the class's first pipeline makes. The transformer is changed: eval mode, float32, no
    gradients.
    """
    name, config = type(transformer).__name__, transformer.config
    if name not in FAMILIES:
        raise UsageError(f"{name}: not a known transformer{nearest(name, FAMILIES)}; known: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    size = size or family.video or (family.size or config.sample_size,) * 2
    patch = family.patch or config.patch_size
    for field, values in family.supported.items():
        if config[field] not in values:
            raise UsageError(f"{name}: {field} is {config[field]!r}, expected {' or '.join(map(repr, values))}")
    if any(side % patch for side in size):
        sides = " x ".join(map(str, size))
        raise UsageError(f"{name}: latents of {sides} do not divide into patches of {patch}")
    tokens = family.default_tokens if tokens is None else tokens
    network = family.network(transformer.eval().float().requires_grad_(False), size, tokens)
    packed = patch // config.get("patch_size", patch)  # cells along a token of what the transformer calls channels
    channels = network.state.shape[0] * packed**2
    out_channels = vars(transformer).get("out_channels", config.get("out_channels")) or channels
    if out_channels not in (channels, 2 * channels):
        raise UsageError(f"{name}: out_channels is {out_channels}, expected {channels} or {2 * channels}")
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    resolution = resolution_name((size[-2], size[-1]), family.pixels)
    model = {"name": name, "resolution": resolution} | public | {"patch_size": patch}
    if family.video:
        model["frames"] = (size[0] - 1) * family.frames + 1
    return replace(
        network,
        model=model,
        learned_variance=out_channels == 2 * channels,
        pixels=family.pixels,
        counts=family.counts(transformer, network),
    )
