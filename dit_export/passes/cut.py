"""The cheapest cut between what runs before a loop and what runs in it, as a minimum cut of the graph's data flow.

    cost = bytes of weights in the loop + Σ bytes of a tensor that crosses × how often it is made
         + OP × vector × ops in the loop + INPUT × vector × tensors that cross and are no vectors

What depends on the loop's input is in the loop. Everything else may be on either side: source side = made before the
loop, sink side = made in the loop. A weight is paid once if any of its readers is in the loop; a tensor is paid once if
it is made before the loop and read in it. A Gather pays for the rows it reads, not for its table. `vector` is one
vector of the loop's usual width, so that small networks are cut as large ones are. Among equal cuts the one with the
fewest ops in the loop is taken.

A tensor can cross if it is a float tensor [rows, ...] of known size, or an input of the graph. Shapes, row counts,
integers and booleans are computed where they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import chain
from statistics import median_low
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from dit_export.passes.dependence import Miss, dependents, row_counts, shared_rows

STEPS = 30  # how often a tensor is made that changes with the timestep; others once
OP = 2 * STEPS  # an op in the loop is worth two vectors a step: one shared projection is handed over block for block
INPUT = STEPS  # an input of the loop's own is worth one: more than layout, less than an op
VECTORS = 3  # the rank of rows × vectors × channels, which travel together
FREE = {"Expand", "Tile", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Identity"}
SHOWN = 5  # priced-out ops that a summary names
TOTAL = 2**29  # the sum of all costs as integers; scipy counts in int32


class PricedOut(NamedTuple):
    """An op that does not depend on the loop and yet is cheaper in it."""

    tensor: str  # its result
    op: str
    shape: tuple[int | str, ...]
    bytes: int  # of one row of the result, times how often it would be made
    weights: int  # bytes of weights that stay in the loop with it


class Cut(NamedTuple):
    crossing: tuple[str, ...]  # tensors made before the loop and read in it, in the order of their use
    direct: tuple[str, ...]  # inputs of the graph that the loop reads besides its own
    priced_out: tuple[PricedOut, ...]
    misses: tuple[Miss, ...]  # what cannot cross although the loop reads it
    weights: int  # bytes of weights that leave
    bytes: int  # bytes of what crosses, one row, times how often it is made

    def summary(self) -> dict[str, Any]:
        """Return, in bytes, what left the loop, what crosses, and what is cheaper in the loop."""
        heaviest = sorted(self.priced_out, key=lambda priced: -priced.weights)[:SHOWN]
        return {
            "weights": self.weights,
            "crossing": len(self.crossing),
            "bytes": self.bytes,
            "direct": list(self.direct),
            "priced_out": len(self.priced_out),
            "priced_out_weights": sum(priced.weights for priced in self.priced_out),
            "heaviest": [f"{priced.op} {priced.tensor} {list(priced.shape[1:])}" for priced in heaviest],
        }


def cut(graph: gs.Graph, loop_inputs: Collection[str], step_inputs: Collection[str] = ()) -> Cut:
    """Find the cheapest cut; `step_inputs` are inputs that change every step, and yet are known before the loop."""
    costs = _Costs(graph, loop_inputs, step_inputs)
    inside = costs.inside()
    crossing: dict[str, gs.Variable] = {}
    direct: set[str] = set()
    misses: dict[str, Miss] = {}
    priced_out: list[PricedOut] = []
    staying: dict[object, int] = {}
    leaving: dict[object, int] = {}
    for node in costs.nodes:
        weights = _weights(node)
        if id(node) not in inside:
            leaving |= weights
            continue
        staying |= weights
        for tensor in node.inputs:
            if tensor.name in costs.ahead:
                direct.add(tensor.name)
            elif tensor.name in costs.invariant and id(tensor.inputs[0]) not in inside:
                crossing[tensor.name] = tensor
            elif tensor.name in costs.invariant and id(node) in costs.fixed and (reason := costs.obstacle(tensor)):
                misses[tensor.name] = Miss("hoist", tensor.name, reason, tensor.shape)
        (out, *_) = node.outputs
        if out.name in costs.invariant and node.op not in FREE:
            shape = tuple(out.shape or ())
            priced_out.append(PricedOut(out.name, node.op, shape, costs.made(out), sum(weights.values())))
    return Cut(
        tuple(crossing),
        tuple(name for name in costs.ahead if name in direct),
        tuple(priced_out),
        tuple(misses.values()),
        sum(size for key, size in leaving.items() if key not in staying),
        sum(costs.made(tensor) for tensor in crossing.values()),
    )


class _Costs:
    """The graph's nodes but for what counts rows, which both sides have, and what each would cost in the loop."""

    def __init__(self, graph: gs.Graph, loop_inputs: Collection[str], step_inputs: Collection[str]) -> None:
        self.ahead = [tensor.name for tensor in graph.inputs if tensor.name not in loop_inputs]
        self._counts = row_counts(graph, shared_rows(graph, loop_inputs))
        self._dependent = dependents(graph, loop_inputs, self._counts)
        self._changing = dependents(graph, step_inputs, self._counts)
        self._rows = {tensor.shape[0] for tensor in graph.inputs if tensor.shape}
        self._vector = _vector(graph, self._dependent)
        self.invariant = dependents(graph, self.ahead, self._counts) - self._dependent
        self.nodes = [node for node in graph.nodes if not self._counts.intersection(t.name for t in node.outputs)]
        self.fixed = {id(node) for node in self.nodes if self._dependent.intersection(t.name for t in node.outputs)}

    def inside(self) -> set[object]:
        """Return the ids of the nodes in the loop."""
        flow = _Flow()
        outside = self._dependent | self._counts
        for node in self.nodes:
            reader = flow.sink if id(node) in self.fixed else id(node)
            if id(node) not in self.fixed and node.op not in FREE:
                flow.edge(flow.source, reader, OP * self._vector)
            for key, size in _weights(node).items():
                flow.once(key, flow.source, reader, size)
            for tensor in node.inputs:
                if isinstance(tensor, gs.Variable) and tensor.name and tensor.name not in outside:
                    maker = id(tensor.inputs[0]) if tensor.inputs else flow.source
                    flow.once(id(tensor), maker, reader, self._price(tensor))
        return self.fixed | flow.sinks()

    def made(self, tensor: gs.Variable) -> int:
        """Return the bytes of one row, times how often it is made."""
        return _bytes(tensor) * (STEPS if tensor.name in self._changing else 1)

    def _price(self, tensor: gs.Variable) -> float:
        if self.obstacle(tensor):
            return math.inf
        packed = tensor.name not in self.ahead and len(tensor.shape) == VECTORS
        return self.made(tensor) + (0 if packed else INPUT * self._vector)

    def obstacle(self, tensor: gs.Variable) -> str:
        """Return why a tensor cannot cross, "" where it can."""
        if tensor.name in self.ahead:
            return ""
        if tensor.shape is None or tensor.dtype is None:
            return "its shape or type is not known; run onnx.shape_inference.infer_shapes_path on the model"
        if np.dtype(tensor.dtype).kind in "biu":
            return "integers and booleans do not cross"
        if not tensor.shape or tensor.shape[0] not in self._rows:
            return "its first dimension is not the rows"
        return "" if all(isinstance(size, int) for size in tensor.shape[1:]) else "it has a free dimension"


class _Flow:
    """Costs as capacities between the source (made before the loop) and the sink (made in it)."""

    source, sink = "source", "sink"

    def __init__(self) -> None:
        self._costs: dict[tuple[object, object], float] = {}

    def edge(self, start: object, end: object, cost: float) -> None:
        self._costs[start, end] = cost

    def once(self, key: object, maker: object, reader: object, cost: float) -> None:
        """Pay the cost once where the maker is on the source's side and at least one reader on the sink's."""
        self.edge(maker, ("once", key), cost)
        self.edge(("once", key), reader, math.inf)

    def sinks(self) -> set[object]:
        """Return what is on the sink's side of the minimum cut that has the least on it."""
        names = dict.fromkeys((self.source, self.sink, *chain.from_iterable(self._costs)))
        index = {name: i for i, name in enumerate(names)}
        finite = sum(cost for cost in self._costs.values() if cost < math.inf)
        unit = max(1.0, finite / TOTAL)
        capacities = [2 * TOTAL if cost == math.inf else max(1, round(cost / unit)) for cost in self._costs.values()]
        starts, ends = zip(*((index[start], index[end]) for start, end in self._costs), strict=True)
        network = csr_matrix((np.array(capacities, np.int32), (starts, ends)), shape=(len(index), len(index)))
        rest = (network - maximum_flow(network, index[self.source], index[self.sink]).flow).tocsr()
        rest.eliminate_zeros()
        reached = set(breadth_first_order(rest.T.tocsr(), index[self.sink], return_predecessors=False).tolist())
        return {name for name, i in index.items() if i in reached}


def _weights(node: gs.Node) -> dict[object, int]:
    """Return the bytes of each weight that the node reads; of a table, those of the rows that a Gather takes."""
    if node.op == "Gather" and isinstance(node.inputs[0], gs.Constant):
        return {(id(node), "rows"): min(_bytes(node.outputs[0]), node.inputs[0].values.nbytes)}
    return {id(tensor): tensor.values.nbytes for tensor in node.inputs if isinstance(tensor, gs.Constant)}


def _vector(graph: gs.Graph, dependent: Collection[str]) -> int:
    """Return the bytes of one vector of the usual width: the median of the loop's last dimensions."""
    tensors = [tensor for name, tensor in graph.tensors().items() if name in dependent and tensor.shape]
    widths = [tensor.shape[-1] for tensor in tensors if len(tensor.shape) == VECTORS] or [t.shape[-1] for t in tensors]
    widths = [width for width in widths if isinstance(width, int)]
    return 4 * (median_low(widths) if widths else 1)


def _bytes(tensor: gs.Variable) -> int:
    """Return the size of one row; a free dimension counts as one."""
    numbers = math.prod(size for size in (tensor.shape or ())[1:] if isinstance(size, int))
    return int(numbers * (4 if tensor.dtype is None else np.dtype(tensor.dtype).itemsize))
