"""The step of a linear solver as a graph without weights, which a device runs after the denoiser:

    (kept, next) = M (latents, prediction, previous),  M [2, 3]

M is what the solver makes of the step (`dit_runtime.sampling.solvers.linear`),
and `kept` what it remembers for the next one.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.graph.onnxfile import layer
from dit_export.graph.trace import OPSET
from dit_export.networks.spec import Signature


def update(signature: Signature) -> gs.Graph:
    """One product of a 2 x 3 matrix with the three states, each a row."""
    inputs = [gs.Variable(spec.name, np.dtype(spec.dtype), list(spec.shape)) for spec in signature.inputs]
    outputs = [gs.Variable(spec.name, np.dtype(spec.dtype), list(spec.shape)) for spec in signature.outputs]
    graph = gs.Graph(inputs=inputs, outputs=outputs, opset=OPSET, ir_version=10, name="update")
    *states, coefficients = inputs
    rows = [layer(graph, "Reshape", [state, np.array([1, -1])], f"{state.name}_row") for state in states]
    stacked = layer(graph, "Concat", rows, "states", axis=0)  # (3, B C H W)
    made = layer(graph, "MatMul", [coefficients, stacked], "made")  # (2, B C H W)
    shape = np.array([2, -1, *outputs[0].shape[1:]])
    made = layer(graph, "Reshape", [made, shape], "made_states")  # (2, B, C, H, W)
    for index, output in enumerate(outputs):
        layer(graph, "Gather", [made, np.array(index)], output, axis=0)
    return graph
