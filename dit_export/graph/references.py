"""References to weights: initializers whose values are read, and transposed, when they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor


def refer(graph: ir.Graph, weights: Mapping[str, Tensor]) -> None:
    """Let initializers refer to `weights` by name, and hold linears' weights as MatMul reads them.

    The exporter writes a linear as MatMul(x, Transpose(weight)), and its optimizer would transpose all weights in
    memory.
    """
    for name, value in graph.initializers.items():
        if name in weights:
            value.const_value = _lazy(value, partial(_read, weights, name))
        readers = [use.node for use in value.uses()]
        orders = {_order(node) for node in readers}
        if len(orders) == 1 and (order := orders.pop()):
            _transpose(value, order)
            for node in readers:
                ir.convenience.replace_all_uses_with(node.outputs[0], value)
                graph.remove(node, safe=True)


def _order(node: ir.Node) -> tuple[int, ...]:
    """Return the order of axes of a Transpose, () of any other node."""
    return tuple(node.attributes["perm"].as_ints()) if node.op_type == "Transpose" else ()


def _transpose(value: ir.Value, order: tuple[int, ...]) -> None:
    tensor = value.const_value
    assert tensor is not None
    value.shape = ir.Shape([tensor.shape.numpy()[axis] for axis in order])
    value.const_value = _lazy(value, lambda: np.ascontiguousarray(tensor.numpy().transpose(order)))


def _read(weights: Mapping[str, Tensor], name: str) -> NDArray[np.generic]:
    return weights[name].float().numpy()


def _lazy(value: ir.Value, read: Callable[[], NDArray[np.generic]]) -> ir.LazyTensor:
    assert value.dtype is not None and isinstance(value.shape, ir.Shape)
    return ir.LazyTensor(lambda: ir.tensor(read()), value.dtype, value.shape, name=value.name)
