"""Q/DQ on the layers: weights with a step a column, activations with a step a tensor, int8 or fp8 (E4M3).

x W ≈ DQ(Q(x)) DQ(W8),  all symmetric, as every backend of this form takes them. fp8 keeps its relative precision over
its range, so its step is largest / 448 and nothing is gained by clipping.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import DTypeLike
from onnx.helper import tensor_dtype_to_np_dtype

from dit_export.graph import onnxfile
from dit_export.precision.layers import find
from dit_export.precision.smooth import LEVELS, Chosen, weight_steps


class Grid(NamedTuple):
    dtype: np.dtype
    end: float  # largest number


GRIDS = {
    "int8": Grid(np.dtype(np.int8), LEVELS),
    "fp8": Grid(tensor_dtype_to_np_dtype(onnx.TensorProto.FLOAT8E4M3FN), 448),
}


def quantize(graph: gs.Graph, chosen: Mapping[str, Chosen], keep: Collection[str] = (), kind: str = "int8") -> int:
    """Put every layer but those to `keep` between Q and DQ; return how many."""
    layers, grid = [layer for layer in find(graph) if layer.name not in keep], GRIDS[kind]
    for layer in layers:
        values, outputs = np.asarray(layer.node.inputs[1].values), 0 if layer.is_convolution else 1
        steps = weight_steps(layer.matrix, grid.end)
        whole = _rounded(values / np.expand_dims(steps, [axis for axis in range(values.ndim) if axis != outputs]), grid)
        zeros = np.zeros(len(steps), grid.dtype)
        stored = onnxfile.layer(graph, "DequantizeLinear", [whole, steps, zeros], f"{layer.name} W", axis=outputs)
        choice = chosen[layer.name]
        step = choice.step if kind == "int8" else choice.largest / grid.end
        layer.node.inputs[0] = between(graph, layer.x, step, layer.name, grid.dtype)
        layer.node.inputs[1] = stored
    graph.cleanup().toposort()
    return len(layers)


def between(graph: gs.Graph, x: gs.Tensor, step: float, name: str, dtype: DTypeLike = np.int8) -> gs.Variable:
    """Return DQ(Q(x)): x on a grid of 8 bits."""
    scale, zero = np.array(step, np.float32), np.zeros((), dtype)
    grid = onnxfile.layer(graph, "QuantizeLinear", [x, scale, zero], f"{name} q")
    return onnxfile.layer(graph, "DequantizeLinear", [grid, scale, zero], f"{name} x")


def _rounded(values: np.ndarray, grid: Grid) -> np.ndarray:
    if grid.dtype.kind == "i":
        values = np.rint(values)
    return np.clip(values, -grid.end, grid.end).astype(grid.dtype)
