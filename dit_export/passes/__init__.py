"""Graph passes, one file a pass; `fuse` is the order in which they run, LOWERINGS what each backend gets besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import onnx_graphsurgeon as gs

from dit_export.graph.onnxfile import sign
from dit_export.networks.spec import ModelSpec, expected_counts, signatures
from dit_export.passes.attention import plain_attention
from dit_export.passes.dynamic import dynamic
from dit_export.passes.gains import fold_gains
from dit_export.passes.group_norm import group_norm
from dit_export.passes.guidance import guide, share_rows
from dit_export.passes.hoist import hoist
from dit_export.passes.pack import group, pack, part
from dit_export.passes.qkv import split_qkv


class Fused(NamedTuple):
    conditioner: gs.Graph  # timesteps [N], labels [N] -> conditioning [N, K, D]
    context: gs.Graph | None  # captions [N, L, C], mask [N, L] -> context [N, M, D], context_mask [N, L]
    denoiser: gs.Graph  # latents, conditioning [G, B, K, D], guidance [B] -> prediction, variance
    counts: dict[str, int]


# What was measured to be faster (ARCHITECTURE.md, "Forms for backends"), on top of what the backend fuses by itself.
LOWERINGS: dict[str, tuple[Callable[[gs.Graph], int], ...]] = {
    "onnxruntime": (plain_attention, group_norm, dynamic),
    "openvino": (split_qkv, group_norm),
}


def require(counts: Mapping[str, int], expected: Mapping[str, int]) -> None:
    """Stops a build whose graph is not the one that the passes know."""
    wrong = [f"{name}: {n}, expected {expected[name]}" for name, n in counts.items() if n != expected[name]]
    if wrong:
        raise RuntimeError(f"the exporter's graph is not the one the passes know ({'; '.join(wrong)})")


def fuse(graph: gs.Graph, spec: ModelSpec) -> Fused:
    """The plain traced graph (used up) to conditioner and denoiser, with what each pass found."""
    hoisted = hoist(graph, ["latents"])
    groups = group(hoisted, "timesteps")
    counts = {"hoist": len(hoisted.frontier), "fold_gains": fold_gains(hoisted.invariant)}
    vectors = {name: pack(hoisted, name, tensors) for name, tensors in groups.items()}
    invariant, denoiser, _ = hoisted
    counts |= {
        "pack": vectors["conditioning"],
        "pack_context": vectors.get("context", 0),
        "share_rows": share_rows(denoiser, "latents", list(groups)),
        "guide": guide(denoiser, "conditioning", spec.channels, spec.guided_channels),
    }
    require(counts, expected_counts(spec))
    names = {"conditioner": ["conditioning"], "context": ["context", "context_mask"]}
    graphs = {"denoiser": denoiser} | {name: part(invariant, names[name]) for name in signatures(spec) if name in names}
    for name, found in graphs.items():
        sign(found, *signatures(spec)[name])
    return Fused(graphs["conditioner"], graphs.get("context"), denoiser, counts)
