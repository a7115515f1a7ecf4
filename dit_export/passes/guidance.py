"""Classifier-free guidance inside the denoiser: one graph with it (G = 2) and without (G = 1).

Rows stay B until the first op that mixes in what stages give: what stands before (patch embedding, first LayerNorm) is
computed once and repeated to G·B rows there. Where the graph reads its own batch size, the state itself is repeated at
the input. At the end, over the guided channels,

    guided = rule(first, last, guidance),  first = out[0], last = out[G − 1]

and every other channel is that of `first`. The rule is a small traced graph (`networks/rules.py`). With G = 1 it is the
identity; to the bit it also is one for a sample of guidance 1 beside others that are guided.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.graph.onnxfile import layer
from dit_export.passes.dependence import Miss, dependents
from dit_runtime.errors import UsageError
from dit_runtime.facts import CONSTANTS

MEETING: str = CONSTANTS["groups_meet"]  # where a backend that runs the groups apart cuts the graph


def share_rows(graph: gs.Graph, state: str, misses: list[Miss]) -> int:
    """Give every input but the state the shape [G, B, ...]; its rows are R = G·B. Return how many tensors are repeated
    to R rows where they first meet such an input: 0 where the state itself is repeated, or nothing is."""
    (latents,) = [tensor for tensor in graph.inputs if tensor.name == state]
    grouped = [tensor for tensor in graph.inputs if tensor is not latents]
    mixed = dependents(graph, [tensor.name for tensor in grouped])
    shared = dependents(graph, [state]) - mixed
    _refuse_fixed_rows(graph, mixed | shared)
    obstacle = _obstacle(graph, mixed, shared)
    body, graph.nodes = list(graph.nodes), []
    for tensor in grouped:
        _flatten(graph, tensor)
    repeated: dict[str, gs.Variable] = {}
    if grouped:
        groups = _groups(graph, grouped[0])
        if obstacle:
            rows = _repeat(graph, latents, groups)
            mixed, shared, repeated = {tensor.name for node in body for tensor in node.outputs}, {state}, {state: rows}
    for node in body:
        if any(tensor.name in mixed for tensor in node.outputs):
            for index, tensor in enumerate(node.inputs):
                if tensor.name in shared:
                    if tensor.name not in repeated:
                        repeated[tensor.name] = _repeat(graph, tensor, groups)
                    node.inputs[index] = repeated[tensor.name]
        graph.nodes.append(node)
    if obstacle and grouped:
        misses.append(obstacle)
    return 0 if obstacle else len(repeated)


def guide(graph: gs.Graph, state: str, rule: gs.Graph) -> int:
    """Make the one output [G·B, C or 2 C, ...] `prediction`, guided over as many channels as the rule mixes, and, where
    it is learned, `variance`; return 1."""
    (latents,) = [tensor for tensor in graph.inputs if tensor.name == state]
    grouped = [tensor for tensor in graph.inputs if tensor is not latents]
    (out,) = graph.outputs
    out.name = "output_rows"
    channels, total, rest = latents.shape[1], out.shape[1], list(out.shape[2:])
    guided = rule.outputs[0].shape[1]
    prediction, variance = (
        gs.Variable(name, dtype=out.dtype, shape=["batch", channels, *rest]) for name in ("prediction", "variance")
    )
    shape = layer(graph, "Concat", [_groups(graph, grouped[0]), np.array([-1, total, *rest])], "out_shape", axis=0)
    grouped_out = layer(graph, "Reshape", [out, shape], MEETING)  # (G, B, C_out, ...)
    first = layer(graph, "Gather", [grouped_out, np.array(0)], "out_first", axis=0)
    last = layer(graph, "Gather", [grouped_out, np.array(-1)], "out_last", axis=0)
    conditional, negative = (_channels(graph, tensor, 0, guided) for tensor in (first, last))
    guidance = gs.Variable("guidance", dtype=np.float32, shape=["batch"])
    weight = layer(graph, "Reshape", [guidance, np.array([-1] + [1] * (1 + len(rest)))], "guidance_weight")
    result = prediction if guided == channels else gs.Variable("guided", dtype=out.dtype)
    _insert(graph, rule, {"conditional": conditional, "negative": negative, "weight": weight, "guided": result})
    if guided != channels:
        layer(graph, "Concat", [result, _channels(graph, first, guided, channels)], prediction, axis=1)
    graph.inputs.append(guidance)
    graph.outputs = [prediction]
    if total > channels:
        layer(graph, "Slice", [first, *_bounds(channels, total)], variance)
        graph.outputs.append(variance)
    return 1


def unguided(graph: gs.Graph, state: str) -> None:
    """Name the one output [B, C or 2 C, ...] `prediction` and, where it is learned, `variance`."""
    (latents,) = [tensor for tensor in graph.inputs if tensor.name == state]
    (out,) = graph.outputs
    channels, total, rest = latents.shape[1], out.shape[1], list(out.shape[2:])
    if total == channels:
        out.name, out.shape = "prediction", ["batch", *out.shape[1:]]
        return
    out.name, graph.outputs = "output_rows", []
    for name, first, last in (("prediction", 0, channels), ("variance", channels, total)):
        part = gs.Variable(name, dtype=out.dtype, shape=["batch", last - first, *rest])
        graph.outputs.append(layer(graph, "Slice", [out, *_bounds(first, last)], part))


def _flatten(graph: gs.Graph, tensor: gs.Variable) -> None:
    """[R, ...] becomes the input [G, B, ...]."""
    rows = gs.Variable(f"{tensor.name}_rows", dtype=tensor.dtype, shape=["rows", *tensor.shape[1:]])
    for user in list(tensor.outputs):
        user.inputs = [rows if other is tensor else other for other in user.inputs]
    flat = np.array([-1, *tensor.shape[1:]], dtype=np.int64)
    tensor.shape = ["groups", "batch", *tensor.shape[1:]]
    layer(graph, "Reshape", [tensor, flat], rows)


def _groups(graph: gs.Graph, grouped: gs.Variable) -> gs.Variable:
    return layer(graph, "Shape", [grouped], f"groups_{len(graph.nodes)}", start=0, end=1)


def _repeat(graph: gs.Graph, tensor: gs.Variable, groups: gs.Variable) -> gs.Variable:
    """G copies of the rows of `tensor`, one group after another."""
    ones = np.ones(len(tensor.shape) - 1, dtype=np.int64)
    counts = layer(graph, "Concat", [groups, ones], f"{tensor.name}_repeats", axis=0)
    rows = gs.Variable(f"{tensor.name}_rows", dtype=tensor.dtype, shape=["rows", *tensor.shape[1:]])
    return layer(graph, "Tile", [tensor, counts], rows)


def _insert(graph: gs.Graph, rule: gs.Graph, outside: Mapping[str, gs.Variable]) -> None:
    """Append the rule's nodes; `outside` has what stands in the graph for the rule's inputs and outputs, by name."""
    inside = [tensor for tensor in rule.tensors().values() if tensor.name not in outside]
    for node in rule.nodes:
        node.name = f"guidance.{node.name}"
        node.inputs = [outside.get(tensor.name, tensor) for tensor in node.inputs]
        node.outputs = [outside.get(tensor.name, tensor) for tensor in node.outputs]
        graph.nodes.append(node)
    for tensor in inside:
        tensor.name = f"guidance.{tensor.name}"
        if isinstance(tensor, gs.Variable) and tensor.shape is not None:
            tensor.shape = ["batch" if isinstance(size, str) else size for size in tensor.shape]


def _bounds(first: int, last: int) -> list[np.ndarray]:
    return [np.array([value]) for value in (first, last, 1)]  # starts, ends, axes


def _channels(graph: gs.Graph, tensor: gs.Variable, first: int, last: int) -> gs.Variable:
    return layer(graph, "Slice", [tensor, *_bounds(first, last)], f"{tensor.name}_{first}_{last}")


def _refuse_fixed_rows(graph: gs.Graph, varying: set[str]) -> None:
    for node in graph.nodes:
        if node.op == "Reshape" and node.outputs[0].name in varying and isinstance(node.inputs[1], gs.Constant):
            target = [int(size) for size in node.inputs[1].values]
            if min(target, default=1) > 0:
                raise UsageError(f"{node.outputs[0].name!r} is reshaped to {target[0]} rows, expected -1")


def _obstacle(graph: gs.Graph, mixed: set[str], shared: set[str]) -> Miss | None:
    """Return why rows cannot change in mid-graph: a shape is computed from them, or they are not the first axis."""
    for node in graph.nodes:
        (out, *_) = node.outputs
        if node.op == "Shape" and node.inputs[0].name in mixed | shared:
            return Miss("share_rows", out.name, "reads the batch size inside the loop")
        if node.op == "Reshape" and out.name in mixed | shared:
            target = node.inputs[1].values[0] if isinstance(node.inputs[1], gs.Constant) else node.inputs[1].name
            if target not in (-1, 0):
                return Miss("share_rows", out.name, "is reshaped to rows that are not -1", target)
        for tensor in node.inputs if out.name in mixed else ():
            if tensor.name in shared and not (tensor.shape and isinstance(tensor.shape[0], str)):
                return Miss("share_rows", tensor.name, "its first axis is not the rows", tensor.shape)
    return None
