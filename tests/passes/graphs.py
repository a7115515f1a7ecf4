"""Graphs made by hand, and numbers for them."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def layer(
    graph: gs.Graph, op: str, inputs: list, shape: list, dtype: type = np.float32, **attrs: object
) -> gs.Variable:
    """Add a node and return its one output; arrays become constants."""
    tensors = [
        gs.Constant(f"c{len(graph.nodes)}_{i}", t) if isinstance(t, np.ndarray) else t for i, t in enumerate(inputs)
    ]
    output = gs.Variable(f"{op.lower()}{len(graph.nodes)}", dtype=dtype, shape=shape)
    graph.nodes.append(gs.Node(op, attrs=attrs, inputs=tensors, outputs=[output]))
    return output


def empty(**inputs: list) -> gs.Graph:
    variables = [gs.Variable(name, dtype=np.float32, shape=shape) for name, shape in inputs.items()]
    return gs.Graph(inputs=variables, opset=20, ir_version=10)


def projected(parts: int = 3, bias: np.ndarray | None = None, axis: int = -1) -> gs.Graph:
    graph = empty(x=["n", 5, 8])
    product = layer(graph, "MatMul", [graph.inputs[0], normal(8, 12)], ["n", 5, 12])
    whole = layer(graph, "Add", [product, normal(12) if bias is None else bias], ["n", 5, 12])
    graph.outputs = [gs.Variable(f"part{i}", dtype=np.float32, shape=["n", 5, 12 // parts]) for i in range(parts)]
    graph.nodes.append(gs.Node("Split", "split", {"axis": axis, "num_outputs": parts}, [whole], list(graph.outputs)))
    return graph
