"""Attention's scores in int8, where a backend gains by that:

softmax(q kᵀ / √d) v ≈ softmax(DQ(Q(q)) DQ(Q(k))ᵀ / √d) v

The second product stays float: a softmax over T tokens has weights near 1/T, and a grid of 8 bits ends at 1/255.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.passes import LOWERINGS
from dit_export.passes.attention import decompose, is_plain
from dit_export.precision.calibrate import Calibration
from dit_export.precision.layers import ATTENTION, find, unmoved
from dit_export.precision.qdq import between
from dit_export.precision.smooth import HEADROOM, LEVELS
from dit_runtime.errors import UsageError

BACKENDS = ("openvino",)  # where it was measured to gain; elsewhere attention is a fused float op
Pass = Callable[[gs.Graph], int]
Steps = Mapping[str, Sequence[float]]  # the grids of q and k, by the name of Attention's output


def steps(denoiser: gs.Graph, calibration: Calibration, keep: Collection[str]) -> Steps:
    """Return the grids of all attentions but those to keep; no GEMM of the denoiser is quantized yet."""
    layers = find(denoiser)
    outputs = {layer.name: calibration.layers[layer.name].output for layer in layers if layer.scored}
    if missing := [name for name, output in outputs.items() if output is None]:
        raise UsageError(f"the calibration has no output of {missing[0]}; calibrate anew")
    grids = {}
    for proj in (layer for layer in layers if layer.kind == "proj" and f"block {layer.block} {ATTENTION}" not in keep):
        qkv = outputs.get(f"block {proj.block} qkv")
        parts = [outputs.get(f"block {proj.block} {kind}") for kind in ("query", "key")]
        if qkv is not None:
            parts = list(np.split(qkv, 3)[:2])
        if all(part is not None for part in parts):
            grids[unmoved(proj.x).name] = [float(HEADROOM * part.max() / LEVELS) for part in parts if part is not None]
    return grids


def passes(backend: str, grids: Steps) -> tuple[Pass, ...]:
    """Return the passes that make a backend's form of an int8 denoiser."""

    def quantize_attention(graph: gs.Graph) -> int:
        matches = [node for node in graph.nodes if is_plain(node) and node.outputs[0].name in grids]
        for node in matches:
            name = node.outputs[0].name
            for index, step in enumerate(grids[name]):
                shape, kind = node.inputs[index].shape, node.inputs[index].dtype
                node.inputs[index] = between(graph, node.inputs[index], step, f"{name} {'qk'[index]}")
                node.inputs[index].shape, node.inputs[index].dtype = shape, kind
            decompose(graph, node)
        graph.cleanup().toposort()
        return len(matches)

    return (quantize_attention, *LOWERINGS[backend]) if backend in BACKENDS else LOWERINGS[backend]
