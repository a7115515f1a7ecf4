"""Loop-invariant code motion over ONNX: what does not depend on the loop's input leaves the loop if that is cheaper.

    f(x, c) = loop(x, c', invariant(c)),  frontier = the tensors of invariant(c) that loop reads,
                                          c' = those of the inputs c that loop reads as they are

A sampling loop calls f with a new x at every step. What is computed from the other inputs alone is split off into a
graph of its own, at the minimum cut of `passes/cut.py`. No node, block or model name appears here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.graph.inspection import cut_lines
from dit_export.passes.cut import Cut, cut
from dit_export.passes.dependence import dependents, extract, shared_rows
from dit_runtime.errors import UsageError, nearest

SHOWN = 5  # refusals in the table


class Hoisted(NamedTuple):
    invariant: gs.Graph  # the other inputs -> frontier
    loop: gs.Graph  # loop inputs, other inputs that it reads as such, frontier -> outputs
    frontier: tuple[str, ...]
    cut: Cut

    @property
    def crosses(self) -> dict[str, int]:
        """Return how many tensors cross in each form, such as "float32 [1, 1152]" for a row."""
        return dict(Counter(f"{np.dtype(t.dtype).name} {list(t.shape[1:])}" for t in self.invariant.outputs))

    def to_dict(self) -> dict[str, Any]:
        priced_out = [priced._asdict() for priced in self.cut.priced_out]
        return {
            "frontier": self.frontier,
            "crosses": self.crosses,
            "direct": self.cut.direct,
            "priced_out": priced_out,
            "misses": [str(miss) for miss in self.cut.misses],
        }

    def table(self) -> str:
        """Describe what left, what crosses, and what could have left but is cheaper in the loop."""
        crosses = ", ".join(f"{count} x {form}" for form, count in self.crosses.items())
        lines = [f"crosses, a row: {crosses}", *cut_lines(self.cut.summary())]
        lines += [f"cannot cross: {miss}" for miss in self.cut.misses[:SHOWN]]
        return "\n".join(lines)


def hoist(graph: gs.Graph, loop_inputs: Collection[str], step_inputs: Collection[str] = ()) -> Hoisted:
    """Split `graph`; `step_inputs` change every step too, and yet are known before the loop, as timesteps are."""
    _check(graph, loop_inputs, step_inputs)
    loop_cut = cut(graph, loop_inputs, step_inputs)
    ahead = [tensor.name for tensor in graph.inputs if tensor.name not in loop_inputs]
    if not loop_cut.crossing:
        reasons = "".join(f"; {miss}" for miss in loop_cut.misses[:3])
        raise UsageError(f"nothing that depends on {', '.join(ahead)} alone is worth hoisting{reasons}")
    shared = shared_rows(graph, loop_inputs)
    own = [tensor.name for tensor in graph.inputs if tensor.name in loop_inputs]
    outputs = [tensor.name for tensor in graph.outputs]
    invariant = extract(graph, ahead, loop_cut.crossing, shared)
    loop = extract(graph, [*own, *loop_cut.direct, *loop_cut.crossing], outputs, shared)
    return Hoisted(invariant, loop, loop_cut.crossing, loop_cut)


def _check(graph: gs.Graph, loop_inputs: Collection[str], step_inputs: Collection[str]) -> None:
    inputs = [tensor.name for tensor in graph.inputs]
    for name in (*loop_inputs, *step_inputs):
        if name not in inputs:
            raise UsageError(f"the graph has no input {name!r}{nearest(name, inputs)}; its inputs: {', '.join(inputs)}")
    if set(inputs) <= set(loop_inputs):
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
