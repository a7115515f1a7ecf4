"""Graph passes, one file a pass; `fuse` is the order in which they run, LOWERINGS what each form gets besides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.passes.attention import masked_attention, plain_attention
from dit_export.passes.cut import VECTORS, Cut
from dit_export.passes.dependence import Miss
from dit_export.passes.depth_to_space import depth_to_space
from dit_export.passes.gains import fold_gains
from dit_export.passes.group_norm import group_norm
from dit_export.passes.guidance import guide, share_rows, unguided
from dit_export.passes.integer_products import integer_products
from dit_export.passes.pack import Pack
from dit_export.passes.qkv import split_qkv
from dit_export.passes.stages import Stage, split_stages
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError

__all__ = ["LOWERINGS", "Fused", "Pack", "Stage", "fuse", "require"]


class Fused(NamedTuple):
    stages: tuple[Stage, ...]  # before the loop, in their order: ports [rows, ...] -> packs [rows, ...]
    denoiser: gs.Graph  # state [B, ...], packs and ports [G, B, ...], guidance [B] -> prediction, variance
    counts: dict[str, int]
    cut: Cut  # of the loop
    misses: tuple[Miss, ...]  # what nearly matched


SHOWN = 5  # refusals in an error

# What was measured to be faster on CPUs (docs/precision.md), on top of what the backend fuses by itself. On CUDA, ONNX
# Runtime keeps Attention, for which it has a kernel; it has none for GroupNormalization, nor for DepthToSpace in bf16.
LOWERINGS: dict[str, tuple[Callable[[gs.Graph], int], ...]] = {
    "onnxruntime": (plain_attention, group_norm, integer_products),
    "onnxruntime-cuda": (masked_attention, group_norm, depth_to_space),
    "openvino": (split_qkv, group_norm),
}


def require(counts: Mapping[str, int], expected: Mapping[str, int], misses: Iterable[Miss] = ()) -> None:
    """Stop a build whose graph is not the one that the passes know; say which candidates each wrong pass refused."""
    wrong = [name for name, count in counts.items() if count != expected.get(name, count)]
    if wrong:
        differences = "; ".join(f"{name}: {counts[name]}, expected {expected[name]}" for name in wrong)
        refused = [str(miss) for miss in misses if miss.rewrite in wrong]
        reasons = f"; refused: {'; '.join(refused[:SHOWN])}" if refused else ""
        raise RuntimeError(f"the exporter's graph is not the one the passes know ({differences}{reasons})")


def fuse(graph: gs.Graph, ports: Sequence[Port], rule: gs.Graph | None = None) -> Fused:
    """Take the plain traced graph, whose inputs are the ports, to stages and denoiser.

    `rule` is the traced rule of guidance; without one, guidance mixes nothing. Both graphs are used up.
    """
    _check(graph, ports)
    stages, denoiser, loop = split_stages(graph, ports)
    misses = list(loop.misses)
    (state,) = [port.name for port in ports if port.role == "state"]
    vectors = {tensor.name: tensor.shape[1] for tensor in denoiser.inputs if len(tensor.shape) == VECTORS}
    context = [pack.name for stage in stages if stage.runs == "condition" for pack in stage.packs]
    packed = [pack.name for stage in stages if stage.runs != "condition" for pack in stage.packs]
    counts = {
        "hoist": len(loop.crossing) + len(loop.direct),
        "fold_gains": sum(fold_gains(stage.graph, misses) for stage in stages),
        "pack": sum(vectors.get(name, 0) for name in packed),
        "pack_context": sum(vectors.get(name, 0) for name in context),
        "share_rows": share_rows(denoiser, state, misses),
        "guide": 0,
    }
    conditioned = any(port.role == "condition" for port in ports)
    if conditioned and [tensor.name for tensor in denoiser.inputs] == [state]:
        raise UsageError(f"what the network makes of {state!r} depends on neither its time nor a condition")
    if rule is not None:
        counts["guide"] = guide(denoiser, state, rule)
    else:
        unguided(denoiser, state)
    for stage in stages:
        stage.graph.toposort()
        for tensor in (*stage.graph.inputs, *stage.graph.outputs):
            tensor.shape = ["rows", *tensor.shape[1:]]
    next(tensor for tensor in denoiser.inputs if tensor.name == state).shape[0] = "batch"
    return Fused(stages, denoiser, counts, loop, tuple(misses))


def _check(graph: gs.Graph, ports: Sequence[Port]) -> None:
    got = {tensor.name: (np.dtype(tensor.dtype).name, tuple(tensor.shape[1:])) for tensor in graph.inputs}
    want = {port.name: (port.dtype, port.shape) for port in ports}
    if got != want:
        raise RuntimeError(f"the graph's inputs are {got}, expected the ports {want}")
    if fixed := [tensor.name for tensor in graph.inputs if isinstance(tensor.shape[0], int)]:
        raise RuntimeError(
            f"{fixed[0]} has a fixed number of rows; export with one free dimension for all inputs' rows"
        )
