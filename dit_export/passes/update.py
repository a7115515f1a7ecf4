"""The step of a linear solver as a graph without weights, which a device runs after the denoiser:

    (kept, next) = M (state, prediction, previous),  M [2, 3]

M is what the solver makes of the step (`dit_runtime.sampling.solvers.linear`), and `kept` is its memory for the next.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.graph.onnxfile import layer
from dit_export.graph.trace import OPSET
from dit_runtime.bundle.manifest import Port


def update(state: Port) -> gs.Graph:
    """Return one product of a 2 x 3 matrix with the three states, each a row."""

    def states(*names: str) -> list[gs.Variable]:
        return [gs.Variable(name, np.dtype(np.float32), ["batch", *state.shape]) for name in names]

    coefficients = gs.Variable("coefficients", np.dtype(np.float32), [2, 3])
    inputs, outputs = states(state.name, "prediction", "previous"), states("kept", "next")
    graph = gs.Graph(inputs=[*inputs, coefficients], outputs=outputs, opset=OPSET, ir_version=10, name="update")
    rows = [layer(graph, "Reshape", [tensor, np.array([1, -1])], f"{tensor.name}_row") for tensor in inputs]
    stacked = layer(graph, "Concat", rows, "states", axis=0)  # (3, B C H W)
    made = layer(graph, "MatMul", [coefficients, stacked], "made")  # (2, B C H W)
    made = layer(graph, "Reshape", [made, np.array([2, -1, *state.shape])], "made_states")  # (2, B, C, H, W)
    for index, output in enumerate(outputs):
        layer(graph, "Gather", [made, np.array(index)], output, axis=0)
    return graph
