"""Classifier-free guidance inside the denoiser: one graph with it (G = 2) and without (G = 1).

Rows stay B until the first op that mixes conditioning in: what stands before (patch embedding, first LayerNorm) is
computed once and repeated to G·B rows there. At the end, over the guided channels,

    guided = last + guidance · (first − last),  first = out[0], last = out[G − 1]

and every other channel is that of `first`. With G = 1 this is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.graph.onnxfile import layer
from dit_export.passes.hoist import dependents
from dit_runtime.errors import UsageError


def share_rows(graph: gs.Graph, latents: str, conditions: Sequence[str]) -> int:
    """conditioning [R, K, D] becomes [G, B, K, D], R = G·B, and whatever conditions besides likewise; returns how many
    tensors are repeated to R rows."""
    mixed = dependents(graph, conditions)
    shared = dependents(graph, [latents]) - mixed
    _refuse_fixed_rows(graph, mixed | shared)

    body, graph.nodes = list(graph.nodes), []
    for given in [tensor for tensor in graph.inputs if tensor.name in conditions]:
        rows = gs.Variable(f"{given.name}_rows", dtype=given.dtype, shape=["rows", *given.shape[1:]])
        for user in list(given.outputs):
            user.inputs = [rows if tensor is given else tensor for tensor in user.inputs]
        flat = np.array([-1, *given.shape[1:]], dtype=np.int64)
        given.shape = ["groups", "batch", *given.shape[1:]]
        layer(graph, "Reshape", [given, flat], rows)
    groups = _groups(graph, given)

    repeated: dict[str, gs.Variable] = {}
    for node in body:
        if node.outputs[0].name in mixed:
            for index, tensor in enumerate(node.inputs):
                if tensor.name in shared:
                    if tensor.name not in repeated:
                        repeated[tensor.name] = _repeat(graph, tensor, groups)
                    node.inputs[index] = repeated[tensor.name]
        graph.nodes.append(node)
    return len(repeated)


def guide(graph: gs.Graph, conditioning: str, channels: int, guided: int) -> int:
    """The one output [G·B, C or 2C, H, W] becomes `prediction` and, where it is learned, `variance`; returns 1."""
    (out,) = graph.outputs
    out.name = "output_rows"
    total, height, width = out.shape[1:]
    given = next(tensor for tensor in graph.inputs if tensor.name == conditioning)
    guidance = gs.Variable("guidance", dtype=np.float32, shape=["batch"])
    prediction, variance = (
        gs.Variable(name, dtype=out.dtype, shape=["batch", channels, height, width])
        for name in ("prediction", "variance")
    )
    shape = layer(graph, "Concat", [_groups(graph, given), np.array([-1, total, height, width])], "out_shape", axis=0)
    grouped = layer(graph, "Reshape", [out, shape], "out_grouped")  # (G, B, C_out, H, W)
    first = layer(graph, "Gather", [grouped, np.array(0)], "out_first", axis=0)
    last = layer(graph, "Gather", [grouped, np.array(-1)], "out_last", axis=0)
    moved = [_channels(graph, tensor, 0, guided) for tensor in (first, last)]
    weight = layer(graph, "Reshape", [guidance, np.array([-1, 1, 1, 1])], "guidance_weight")
    change = layer(graph, "Mul", [weight, layer(graph, "Sub", moved, "guidance_direction")], "guidance_change")
    if guided == channels:
        layer(graph, "Add", [moved[1], change], prediction)
    else:
        result = layer(graph, "Add", [moved[1], change], "guided")
        layer(graph, "Concat", [result, _channels(graph, first, guided, channels)], prediction, axis=1)
    graph.inputs.append(guidance)
    graph.outputs = [prediction]
    if total > channels:
        layer(graph, "Slice", [first, *_bounds(channels, total)], variance)
        graph.outputs.append(variance)
    return 1


def _groups(graph: gs.Graph, conditioning: gs.Variable) -> gs.Variable:
    return layer(graph, "Shape", [conditioning], f"groups_{len(graph.nodes)}", start=0, end=1)


def _repeat(graph: gs.Graph, tensor: gs.Variable, groups: gs.Variable) -> gs.Variable:
    """G copies of the rows of `tensor`, one group after another."""
    ones = np.ones(len(tensor.shape) - 1, dtype=np.int64)
    counts = layer(graph, "Concat", [groups, ones], f"{tensor.name}_repeats", axis=0)
    rows = gs.Variable(f"{tensor.name}_rows", dtype=tensor.dtype, shape=["rows", *tensor.shape[1:]])
    return layer(graph, "Tile", [tensor, counts], rows)


def _bounds(first: int, last: int) -> list[np.ndarray]:
    return [np.array([value]) for value in (first, last, 1)]  # starts, ends, axes


def _channels(graph: gs.Graph, tensor: gs.Variable, first: int, last: int) -> gs.Variable:
    return layer(graph, "Slice", [tensor, *_bounds(first, last)], f"{tensor.name}_{first}_{last}")


def _refuse_fixed_rows(graph: gs.Graph, varying: set[str]) -> None:
    """Rows change in mid-graph, so no shape may be computed from the batch or name it as a number."""
    for node in graph.nodes:
        if node.op == "Shape" and node.inputs[0].name in varying:
            raise UsageError(f"{node.outputs[0].name!r} reads the batch size inside the loop; reshape with -1 instead")
        if node.op == "Reshape" and node.outputs[0].name in varying and node.inputs[1].values[0] not in (-1, 0):
            raise UsageError(f"{node.outputs[0].name!r} is reshaped to {node.inputs[1].values[0]} rows, expected -1")
