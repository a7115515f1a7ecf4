"""Attention's scores in int8, where a backend gains by that:

softmax(q kᵀ / √d) v ≈ softmax(DQ(Q(q)) DQ(Q(k))ᵀ / √d) v

The second product stays float: a softmax over T tokens has weights near 1/T, and a grid of 8 bits ends at 1/255.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import onnx_graphsurgeon as gs

from dit_export.passes import LOWERINGS
from dit_export.passes.attention import decompose, is_plain
from dit_export.precision.calibrate import Calibration
from dit_export.precision.layers import find
from dit_export.precision.qdq import between
from dit_export.precision.smooth import HEADROOM, LEVELS
from dit_runtime.errors import UsageError

BACKENDS = ("openvino",)  # where it was measured to gain; elsewhere attention is a fused float op
Pass = Callable[[gs.Graph], int]
Steps = Mapping[str, Sequence[float]]  # the grids of q and k, by the name of Attention's output


def steps(denoiser: gs.Graph, calibration: Calibration, keep: Collection[str]) -> Steps:
    """Return the grids of all attentions but those to keep; no layer of the denoiser is quantized yet."""
    scores = {layer.scores.name: layer.scores for layer in find(denoiser) if layer.scores}
    grids = {}
    for own in (own for name, own in scores.items() if name not in keep):
        outputs = [(calibration.layers[name].output, name, channels) for name, channels in own.parts]
        if missing := [name for output, name, _ in outputs if output is None]:
            raise UsageError(f"the calibration has no output of {missing[0]}; calibrate anew")
        largest = [output[channels].max() for output, _, channels in outputs if output is not None]
        grids[own.attention.outputs[0].name] = [float(HEADROOM * value / LEVELS) for value in largest]
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
