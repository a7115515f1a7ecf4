"""Graph passes, one file a pass; `fuse` is the order in which they run."""

from __future__ import annotations

from typing import NamedTuple

import onnx_graphsurgeon as gs

from dit_export.fuse.gains import fold_gains
from dit_export.fuse.guidance import guide, share_rows
from dit_export.fuse.hoist import hoist
from dit_export.fuse.pack import pack
from dit_export.graphs import sign
from dit_export.spec import ModelSpec, signatures


class Fused(NamedTuple):
    conditioner: gs.Graph  # timesteps [N], labels [N] -> conditioning [N, K, D]
    denoiser: gs.Graph  # latents, conditioning [G, B, K, D], guidance [B] -> prediction, variance
    counts: dict[str, int]


def expected_counts(spec: ModelSpec) -> dict[str, int]:
    """What each pass must find in a DiT of this spec; an exporter that changes its form fails here, not in silence."""
    return {"hoist": spec.num_vectors, "pack": spec.num_vectors, "fold_gains": spec.gains, "share_rows": 2, "guide": 1}


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
    expected = expected_counts(spec)
    wrong = [
        f"{name}: {counts[name]}, expected {expected[name]}" for name in expected if counts[name] != expected[name]
    ]
    if wrong:
        raise RuntimeError(f"the exporter's graph is not the one the passes know ({'; '.join(wrong)})")
    sign(conditioner, *signatures(spec)["conditioner"])
    sign(denoiser, *signatures(spec)["denoiser"])
    return Fused(conditioner, denoiser, counts)
