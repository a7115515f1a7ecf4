"""Graph passes, one file a pass; `fuse` is the order in which they run, LOWERINGS what each backend gets besides."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import onnx_graphsurgeon as gs

from dit_export.fuse.attention import plain_attention
from dit_export.fuse.dynamic import dynamic
from dit_export.fuse.gains import fold_gains
from dit_export.fuse.group_norm import group_norm
from dit_export.fuse.guidance import guide, share_rows
from dit_export.fuse.hoist import hoist
from dit_export.fuse.pack import pack
from dit_export.fuse.qkv import split_qkv
from dit_export.graphs import sign
from dit_export.spec import ModelSpec, signatures
from dit_runtime.backends import QUANTIZED


class Fused(NamedTuple):
    conditioner: gs.Graph  # timesteps [N], labels [N] -> conditioning [N, K, D]
    denoiser: gs.Graph  # latents, conditioning [G, B, K, D], guidance [B] -> prediction, variance
    counts: dict[str, int]


# What was measured to be faster (ARCHITECTURE.md, "Forms for backends"), on top of what the backend fuses by itself.
LOWERINGS: dict[str, tuple[Callable[[gs.Graph], int], ...]] = {
    "onnxruntime": (plain_attention, group_norm, dynamic),
    "openvino": (split_qkv, group_norm),
}


def expected_counts(spec: ModelSpec, precision: str = "fp32", kept: Collection[str] = ()) -> dict[str, int]:
    """What each pass must find in a DiT of this spec; an exporter that changes its form fails here, not in silence."""
    floats = sum(name.endswith("attention") for name in kept)
    quantized = 4 * spec.depth - len(kept) + floats if precision in QUANTIZED else 0  # qkv, proj, fc1, fc2
    return {
        "hoist": spec.num_vectors,
        "pack": spec.num_vectors,
        "fold_gains": spec.gains,
        "share_rows": 2,
        "guide": 1,
        "quantize": quantized,
        "plain_attention": spec.depth,
        "split_qkv": spec.depth,
        "quantize_attention": spec.depth - floats,
        "group_norm": 0,
        "dynamic": quantized,
        "narrow": 5 * spec.depth + 2,  # four linears and attention a block, the patches, the last linear
    }


def require(counts: Mapping[str, int], expected: Mapping[str, int]) -> None:
    """Stops a build whose graph is not the one that the passes know."""
    wrong = [f"{name}: {n}, expected {expected[name]}" for name, n in counts.items() if n != expected[name]]
    if wrong:
        raise RuntimeError(f"the exporter's graph is not the one the passes know ({'; '.join(wrong)})")


def fuse(graph: gs.Graph, spec: ModelSpec) -> Fused:
    """The plain traced graph (used up) to conditioner and denoiser, with what each pass found."""
    hoisted = hoist(graph, ["latents"])
    conditioner, denoiser, frontier = hoisted
    counts = {
        "hoist": len(frontier),
        "fold_gains": fold_gains(conditioner),
        "pack": pack(hoisted, "conditioning"),
        "share_rows": share_rows(denoiser, "latents", "conditioning"),
        "guide": guide(denoiser, "conditioning", spec.channels, spec.guided_channels),
    }
    require(counts, expected_counts(spec))
    sign(conditioner, *signatures(spec)["conditioner"])
    sign(denoiser, *signatures(spec)["denoiser"])
    return Fused(conditioner, denoiser, counts)
