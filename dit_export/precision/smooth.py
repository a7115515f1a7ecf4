"""Smoothing (Xiao et al., arXiv 2211.10438) without a cost at run time:

    x W = (x / s) (s W),  s_k = max|x_k|^alpha / max|W_k|^(1 − alpha)

for each input channel k of a GEMM. The division folds into what makes x: the gain and the shift of the norm before it,
which are adaLN's, made by the conditioner, or the norm's own; the rows of W_v and b_v for proj (a convex mix of v's
rows is proj's input), or for a cross-attention's proj the values that are made outside the loop. Between GELU and fc2,
and where a cross-attention reads the residual stream as it is, nothing can be folded. alpha is searched for each GEMM,
as is the step of its activations' grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from dit_export.graph import onnxfile
from dit_export.precision.calibrate import Calibration, LayerStatistics
from dit_export.precision.layers import MOVERS, Layer, find, unmoved
from dit_runtime.errors import UsageError

ALPHAS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
HEADROOM = 1.1  # of the largest magnitude that was seen: other classes and seeds reach further
SHRINKS = (1.0, 0.95, 0.9)  # of that; to cut off more looks cheap on the kept rows, and the rare ones pay for it
LEVELS = 127  # of symmetric int8
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Chosen:
    """The quantization of a GEMM's input."""

    alpha: float
    divisors: Floats  # (K,)
    step: float  # of the activations' grid, after the division
    error: float  # relative L2 of the GEMM's output on the calibration's rows
    largest: float = 0.0  # magnitude of the input, after the division


class Smoothed(NamedTuple):
    """A denoiser that is ready to be quantized."""

    denoiser: gs.Graph
    chosen: Mapping[str, Chosen]  # by layer
    calibration: Calibration


def choose(seen: LayerStatistics, weight: Floats, smooth: bool) -> Chosen:
    """Return the alpha and the step whose quantized product has the least error on the calibration's rows."""
    best: Chosen | None = None
    exact = seen.sample @ weight
    scale = float(np.linalg.norm(exact)) or 1.0
    for alpha in ALPHAS if smooth else ALPHAS[:1]:
        divisors = choose_divisors(seen.largest, weight, alpha)
        sample, scaled = seen.sample / divisors, fake_weight(weight * divisors[:, None])
        largest = float((seen.largest / divisors).max()) or 1.0
        for shrink in SHRINKS:
            step = HEADROOM * shrink * largest / LEVELS
            grid = np.clip(np.rint(sample / step), -LEVELS, LEVELS) * step
            error = float(np.linalg.norm(grid @ scaled - exact)) / scale
            if best is None or error < best.error:
                best = Chosen(alpha, divisors, step, error, largest)
    assert best is not None
    return best


def choose_divisors(largest: Floats, weight: Floats, alpha: float) -> Floats:
    """Return s for the input channels of a weight (K, N), from the largest magnitude that each has; (K,)."""
    if alpha == 0:
        return np.ones_like(largest)
    columns = np.abs(weight).max(axis=1)
    s = np.maximum(largest, 1e-5) ** alpha / np.maximum(columns, 1e-5) ** (1 - alpha)
    s /= np.exp(np.log(s).mean())  # around 1: what is folded keeps its size
    return s.astype(np.float32)


def weight_steps(weight: Floats, end: float = LEVELS) -> Floats:
    """Return the grid of each output channel, whose largest number is `end`; (N,)."""
    return (np.maximum(np.abs(weight).max(axis=0), 1e-12) / end).astype(np.float32)


def fake_weight(weight: Floats) -> Floats:
    steps = weight_steps(weight)
    return np.rint(weight / steps) * steps


def smooth(stages: Sequence[gs.Graph], denoiser: gs.Graph, calibration: Calibration) -> dict[str, Chosen]:
    """Choose for every token GEMM and fold the divisors into the graphs, whose function stays what it was.

    `stages` are the graphs before the loop, which make the vectors that the denoiser reads.
    """
    layers = find(denoiser)
    if missing := [layer.name for layer in layers if layer.name not in calibration.layers]:
        raise UsageError(f"the calibration has no {missing[0]}; it was made for another network")
    chosen: dict[str, Chosen] = {}
    for group in grouped(layers):
        weights = [np.array(layer.weight.values) for layer in group]
        seen = calibration.layers[group[0].name]
        if seen.largest.shape != weights[0].shape[:1]:
            got, expected = len(seen.largest), len(weights[0])
            raise UsageError(f"the calibration's {group[0].name} has {got} channels, expected {expected}")
        places = _makers(group, layers)
        choice = choose(seen, np.concatenate(weights, axis=1), bool(places))
        chosen |= {layer.name: choice for layer in group}
        if (choice.divisors == 1).all():
            continue
        for layer, weight in zip(group, weights, strict=True):
            _set(layer.gemm, 1, weight * choice.divisors[:, None])
        for node, index in places:
            tensor = node.inputs[index]
            if isinstance(tensor, gs.Constant):
                values = np.array(tensor.values)
                values[..., -len(choice.divisors) :] /= choice.divisors
                _set(node, index, values)
            else:
                _divide_vector(stages, tensor, choice.divisors)
    return chosen


def grouped(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Return the layers that read one tensor together: they share divisors and a grid."""
    groups: dict[int, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(id(layer.x), []).append(layer)
    return list(groups.values())


def _makers(group: Sequence[Layer], layers: Sequence[Layer]) -> list[tuple[gs.Node, int]]:
    """Return the inputs of nodes that can be divided in the group's place, as (node, index of the input).

    They are vectors from outside the loop, or parameters, of which the last columns count. There are none where
    something else reads the group's input, or where nothing linear makes it.
    """
    first = group[0]
    if not first.x.inputs or len(first.x.outputs) != len(group):
        return []
    (node,) = first.x.inputs
    if first.kind in ("proj", "cross"):
        attention = first.attention
        assert attention is not None
        values = attention.inputs[2].inputs[0]
        if values.op == "Concat":  # of several streams, whose layers read other inputs
            return []
        while values.inputs[0].inputs and values.inputs[0].inputs[0].op in MOVERS:
            values = values.inputs[0].inputs[0]
        if _is_given(values.inputs[0]):
            return [(values, 0)]
        makers = [layer for layer in layers if layer.attention is attention and layer.kind in ("qkv", "value")]
        return [(layer.gemm, 1) for layer in makers] + [(layer.add, _constant(layer.add)) for layer in makers]
    if node.op == "LayerNormalization":
        return [(node, 1), (node, 2)] if len(node.inputs) == 3 else []
    if node.op == "Add":  # LN · gain + shift
        for index, tensor in enumerate(node.inputs):
            product = node.inputs[1 - index].inputs
            if _is_given(tensor) and product and product[0].op == "Mul":
                gains = [n for n, factor in enumerate(product[0].inputs) if _is_given(factor)]
                return [(product[0], gains[0]), (node, index)] if gains else []
    return []


def _is_given(tensor: gs.Tensor) -> bool:
    """Return whether the tensor is a part of a graph's input that nothing else reads."""
    if len(tensor.outputs) != 1 or not tensor.inputs or tensor.inputs[0].op != "Split":
        return False
    return not unmoved(tensor.inputs[0].inputs[0]).inputs


def _constant(node: gs.Node) -> int:
    return next(index for index, tensor in enumerate(node.inputs) if isinstance(tensor, gs.Constant))


def _set(node: gs.Node, index: int, values: Floats) -> None:
    """Give the node a parameter that no other node reads: the exporter lets equal parameters share a tensor."""
    node.inputs[index] = gs.Constant(f"{node.outputs[0].name}.{index}", values)


def _divide_vector(stages: Sequence[gs.Graph], vector: gs.Tensor, divisors: Floats) -> None:
    """Divide the vector where it is made, so that nothing is added inside the loop."""
    (split,) = vector.inputs
    name = unmoved(split.inputs[0]).name
    graph, packed = next(
        (graph, tensor.inputs[0]) for graph in stages for tensor in graph.outputs if tensor.name == name
    )
    index = split.outputs.index(vector)
    made = packed.inputs[index]
    packed.inputs[index] = onnxfile.layer(graph, "Mul", [made, 1 / divisors], f"{made.name}_smoothed")
    graph.toposort()


def pack_divisors(denoiser: gs.Graph, chosen: Mapping[str, Chosen]) -> dict[str, Floats]:
    """Return, per pack that the denoiser reads, the divisor of each vector, (K, D), for comparing with PyTorch's."""
    divisors: dict[str, Floats] = {}
    layers = find(denoiser)
    for group in grouped(layers):
        for node, index in _makers(group, layers):
            vector = node.inputs[index]
            if not isinstance(vector, gs.Constant):
                (split,) = vector.inputs
                sizes, name = split.inputs[1].values, unmoved(split.inputs[0]).name
                table = divisors.setdefault(name, np.ones((int(sizes.sum()), vector.shape[-1]), np.float32))
                rows = np.split(table, np.cumsum(sizes)[:-1])
                rows[split.outputs.index(vector)][:] = chosen[group[0].name].divisors
    return divisors
