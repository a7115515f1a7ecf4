"""Data dependence in an ONNX graph: what follows from an input, and what follows from row counts alone.

A row count (the batch size) is known wherever there are rows, so it counts for no dependence: each part of a graph that
is cut in two reads it off an input of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import onnx_graphsurgeon as gs


class Miss(NamedTuple):
    """A candidate that a pass refused."""

    rewrite: str  # the pass, as its count is called
    node: str
    reason: str
    value: object = None

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}" + ("" if self.value is None else f" ({self.value})")


def dependents(graph: gs.Graph, names: Iterable[str], without: Collection[str] = ()) -> set[str]:
    """Return the names of all tensors that depend on the named ones, those included, by a way that leads through none
    of `without`; nodes stand in topological order."""
    reached = set(names)
    for node in graph.nodes:
        if any(tensor.name in reached for tensor in node.inputs):
            outputs = [tensor.name for tensor in node.outputs if tensor.name]  # "" is an optional one left out
            reached.update(name for name in outputs if name not in without)
    return reached


def row_dimensions(tensors: Iterable[gs.Variable]) -> dict[str, gs.Variable]:
    """Return the named first dimensions of these inputs, each with an input that has it."""
    return {tensor.shape[0]: tensor for tensor in tensors if tensor.shape and isinstance(tensor.shape[0], str)}


def shared_rows(graph: gs.Graph, loop_inputs: Collection[str]) -> set[str]:
    """Return the row dimensions that the loop's inputs and the other ones have in common."""
    own = row_dimensions(tensor for tensor in graph.inputs if tensor.name in loop_inputs)
    return own.keys() & row_dimensions(tensor for tensor in graph.inputs if tensor.name not in loop_inputs).keys()


def row_counts(graph: gs.Graph, shared: Collection[str]) -> set[str]:
    """Return the names of what follows from the row counts `shared` and constants alone."""
    counts: set[str] = set()
    for node in graph.nodes:
        inputs = [tensor.name for tensor in node.inputs if isinstance(tensor, gs.Variable) and tensor.name]
        if _counts_rows(node, shared) or (inputs and counts.issuperset(inputs)):
            counts.update(tensor.name for tensor in node.outputs if tensor.name)
    return counts


def extract(graph: gs.Graph, inputs: Sequence[str], outputs: Sequence[str], shared: Collection[str]) -> gs.Graph:
    """Return a copy of the part of the graph that makes `outputs` of `inputs`; row counts of the dimensions `shared`
    are read off those inputs, and an input that is not used falls away."""
    part = graph.copy()
    tensors = part.tensors()
    part.inputs = [tensors[name] for name in inputs]
    part.outputs = [tensors[name] for name in outputs]
    own = row_dimensions(reversed(part.inputs))  # the first that has it
    for node in part.nodes:
        if _counts_rows(node, shared) and node.inputs[0].shape[0] in own:
            node.inputs[0] = own[node.inputs[0].shape[0]]
    for tensor in part.inputs:
        tensor.inputs.clear()
    return part.cleanup(remove_unused_graph_inputs=True)


def _counts_rows(node: gs.Node, shared: Collection[str]) -> bool:
    """Match Shape(tensor)[0] where the tensor's rows are one of these dimensions."""
    if node.op != "Shape" or not node.inputs[0].shape or node.inputs[0].shape[0] not in shared:
        return False
    (shape,) = node.outputs
    first = node.attrs.get("end") == 1 or (shape.outputs and all(_takes_first(user, shape) for user in shape.outputs))
    return node.attrs.get("start", 0) == 0 and bool(first)


def _takes_first(node: gs.Node, shape: gs.Variable) -> bool:
    """Match Gather(shape, 0)."""
    if node.op != "Gather" or node.inputs[0] is not shape:
        return False
    return isinstance(node.inputs[1], gs.Constant) and not node.inputs[1].values.any()
