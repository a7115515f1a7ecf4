"""Loop-invariant code motion over ONNX: what does not depend on the loop's input leaves the loop.

    f(x, c) = loop(x, invariant(c)),  frontier = the tensors of invariant(c) that loop reads

A sampling loop calls f with a new x at every step; everything computed from the other inputs alone is split off into
a graph of its own. The cut is found by data dependence, so no node, block or model name appears here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import onnx_graphsurgeon as gs

from dit_runtime.errors import UsageError, nearest

REPEAT = {"Expand", "Tile"}  # their input is the smaller cut
LAYOUT = REPEAT | {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Identity"}
VECTORS = 3  # the rank of rows × vectors × channels, the form in which the frontier is carried
SHAPES = {"Shape", "Size"}


class Hoisted(NamedTuple):
    invariant: gs.Graph  # the other inputs -> frontier
    loop: gs.Graph  # loop inputs, frontier -> outputs
    frontier: tuple[str, ...]


def dependents(graph: gs.Graph, names: Iterable[str], without: Collection[str] = ()) -> set[str]:
    """Names of all tensors that depend on the named ones, those included, by a way that leads through none of
    `without`; nodes stand in topological order."""
    found = set(names)
    for node in graph.nodes:
        if any(tensor.name in found for tensor in node.inputs):
            outputs = [tensor.name for tensor in node.outputs if tensor.name]  # "" is an optional one left out
            found.update(name for name in outputs if name not in without)
    return found


def hoist(graph: gs.Graph, loop_inputs: Collection[str]) -> Hoisted:
    """Splits `graph` where tensors cross from invariant to loop-dependent nodes."""
    rest = [tensor.name for tensor in graph.inputs if tensor.name not in loop_inputs]
    _check(graph, loop_inputs, rest)
    shared = _first_dimensions(graph, loop_inputs).keys() & _first_dimensions(graph, rest).keys()
    counts = _row_counts(graph, shared)
    dependent = dependents(graph, loop_inputs, counts)
    invariant = dependents(graph, rest, counts) - dependent
    sized = [node.outputs[0].name for node in graph.nodes if node.op in SHAPES]
    data = {name for name, tensor in graph.tensors().items() if tensor.shape is None or len(tensor.shape) > 1}
    shapes = dependents(graph, sized, data)  # what has got such a shape is none itself

    frontier: dict[str, None] = {}  # ordered: the loop's order of use
    for node in graph.nodes:
        if any(tensor.name in dependent for tensor in node.outputs):
            for tensor in node.inputs:
                if tensor.name in invariant:
                    frontier[_moved_back(tensor, invariant).name] = None
    for name in frontier:
        if name in shapes:
            raise UsageError(
                f"{name!r}, a shape computed from {', '.join(rest)}, is read inside the loop; "
                f"export the model with its batch size taken from {', '.join(loop_inputs)}"
            )
    if not frontier:
        raise UsageError(f"nothing in the graph depends on {', '.join(rest)} alone, so nothing can be hoisted")

    before, loop = graph.copy(), graph.copy()
    _count_own_rows(before, rest, shared)
    _count_own_rows(loop, loop_inputs, shared)
    tensors = before.tensors()
    before.inputs = [tensor for tensor in before.inputs if tensor.name in rest]
    before.outputs = [tensors[name] for name in frontier]
    tensors = loop.tensors()
    loop.inputs = [tensor for tensor in loop.inputs if tensor.name in loop_inputs] + [tensors[n] for n in frontier]
    for name in frontier:
        tensors[name].inputs.clear()
    return Hoisted(before.cleanup(), loop.cleanup(), tuple(frontier))


def _check(graph: gs.Graph, loop_inputs: Collection[str], rest: list[str]) -> None:
    inputs = [tensor.name for tensor in graph.inputs]
    for name in loop_inputs:
        if name not in inputs:
            raise UsageError(f"the graph has no input {name!r}{nearest(name, inputs)}; its inputs: {', '.join(inputs)}")
    if not rest:
        raise UsageError(f"every input ({', '.join(inputs)}) is a loop input, so nothing can be hoisted")
    for node in graph.nodes:
        if list(node.subgraphs()):
            raise UsageError(
                f"node {node.name!r} ({node.op}) holds a subgraph; hoisting needs a graph without branches"
            )
    dependent = dependents(graph, loop_inputs)
    for tensor in graph.outputs:
        if tensor.name not in dependent:
            raise UsageError(f"output {tensor.name!r} does not depend on {', '.join(loop_inputs)}")


def _moved_back(tensor: gs.Variable, invariant: set[str]) -> gs.Variable:
    """Moves the cut up through pure layout while that makes it smaller or brings it to rows × vectors × channels."""
    while tensor.inputs and (node := tensor.inputs[0]).op in LAYOUT:
        source, *others = node.inputs
        carried = len(tensor.shape or ()) == VECTORS and node.op not in REPEAT
        if carried or source.name not in invariant or not all(isinstance(other, gs.Constant) for other in others):
            break
        tensor = source
    return tensor


def _first_dimensions(graph: gs.Graph, names: Collection[str]) -> dict[str, gs.Variable]:
    """The named dimensions that these inputs' rows have, each with an input that has it."""
    found = [tensor for tensor in graph.inputs if tensor.name in names and tensor.shape]
    return {tensor.shape[0]: tensor for tensor in found if isinstance(tensor.shape[0], str)}


def _row_counts(graph: gs.Graph, shared: Collection[str]) -> set[str]:
    """Names of what follows from row counts that both halves know; either computes it, so it never crosses and binds
    nothing to one of them."""
    found: set[str] = set()
    for node in graph.nodes:
        given = [tensor.name for tensor in node.inputs if isinstance(tensor, gs.Variable) and tensor.name]
        if _counts_rows(node, shared) or (given and found.issuperset(given)):
            found.update(tensor.name for tensor in node.outputs)
    return found


def _counts_rows(node: gs.Node, shared: Collection[str]) -> bool:
    """Shape(tensor)[0] where the tensor's rows are a dimension that both halves know."""
    if node.op != "Shape" or not node.inputs[0].shape or node.inputs[0].shape[0] not in shared:
        return False
    (shape,) = node.outputs
    first = node.attrs.get("end") == 1 or (shape.outputs and all(_takes_first(user, shape) for user in shape.outputs))
    return node.attrs.get("start", 0) == 0 and bool(first)


def _takes_first(node: gs.Node, shape: gs.Variable) -> bool:
    """Gather(shape, 0)."""
    if node.op != "Gather" or node.inputs[0] is not shape:
        return False
    return isinstance(node.inputs[1], gs.Constant) and not node.inputs[1].values.any()


def _count_own_rows(half: gs.Graph, names: Collection[str], shared: Collection[str]) -> None:
    own = _first_dimensions(half, names)
    for node in half.nodes:
        if _counts_rows(node, shared):
            node.inputs[0] = own[node.inputs[0].shape[0]]
