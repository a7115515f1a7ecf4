"""Q/DQ on the token GEMMs: int8 weights with a step a column, int8 activations with a step a tensor.

x W ≈ DQ(Q(x)) DQ(W8),  both symmetric, as every backend of this form takes them
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.graphs import layer
from dit_export.quantize.layers import find
from dit_export.quantize.smooth import LEVELS, Chosen, weight_steps

ZERO = np.zeros((), np.int8)


def quantize(graph: gs.Graph, chosen: Mapping[str, Chosen], keep: Collection[str] = ()) -> int:
    """Puts every token GEMM but those to `keep` between Q and DQ; returns how many."""
    layers = [one for one in find(graph) if one.name not in keep]
    for one in layers:
        weight = np.asarray(one.weight.values)
        steps = weight_steps(weight)
        whole = np.clip(np.rint(weight / steps), -LEVELS, LEVELS).astype(np.int8)
        stored = layer(
            graph, "DequantizeLinear", [whole, steps, np.zeros(len(steps), np.int8)], f"{one.name} W", axis=1
        )
        one.gemm.inputs = [between(graph, one.x, chosen[one.name].step, one.name), stored]
    graph.cleanup().toposort()
    return len(layers)


def between(graph: gs.Graph, x: gs.Tensor, step: float, name: str) -> gs.Variable:
    """x on a grid of 8 bits: DQ(Q(x))."""
    scale = np.array(step, np.float32)
    grid = layer(graph, "QuantizeLinear", [x, scale, ZERO], f"{name} q")
    return layer(graph, "DequantizeLinear", [grid, scale, ZERO], f"{name} x")
