"""Smoothing (Xiao et al., arXiv 2211.10438) without a cost at run time:

    x W = (x / s) (s W),  s_k = max|x_k|^alpha / max|W_k|^(1 − alpha)

for each input channel k of a layer. The division folds into what makes x, which `makers.py` finds: a norm's gain and
shift, columns of a weight, vectors that are made before the loop. Between GELU and fc2, and where a cross-attention
reads the residual stream as it is, nothing can be folded. alpha is searched for each group of layers that share
divisors, the step of the activations' grid for each tensor that they read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from dit_export.graph import onnxfile
from dit_export.precision.calibrate import Calibration, LayerStatistics
from dit_export.precision.layers import Layer, find, own_weights, unmoved
from dit_export.precision.makers import Group, Ints, Place, grouped
from dit_runtime.errors import UsageError

ALPHAS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
HEADROOM = 1.1  # of the largest magnitude that was seen: other classes and seeds reach further
SHRINKS = (1.0, 0.95, 0.9)  # of that; to cut off more looks cheap on the kept rows, and the rare ones pay for it
LEVELS = 127  # of symmetric int8
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Chosen:
    """The quantization of a layer's input."""

    alpha: float
    divisors: Floats  # (K,)
    step: float  # of the activations' grid, after the division
    error: float  # relative L2 of the layer's output on the calibration's rows
    largest: float = 0.0  # magnitude of the input, after the division


class Smoothed(NamedTuple):
    """A denoiser that is ready to be quantized."""

    denoiser: gs.Graph
    chosen: Mapping[str, Chosen]  # by layer
    calibration: Calibration


class Part(NamedTuple):
    """A tensor that layers read."""

    statistics: LayerStatistics
    matrices: Sequence[Floats]  # the layers' weights, (K, N) each; a large network's are memory maps

    @property
    def weight(self) -> Floats:
        return np.concatenate(self.matrices, axis=1)


def choose(parts: Sequence[Part], channels: Ints, ties: Ints) -> list[Chosen]:
    """Return, per part, the alpha and the step whose quantized products have the least error on the calibration's rows.

    The parts share the divisors. These are 1 but for `channels`, and equal where `ties` has one number for several.
    """
    largest = np.max([part.statistics.largest for part in parts], axis=0)
    columns = np.max([np.abs(weight).max(axis=1) for part in parts for weight in part.matrices], axis=0)
    candidates, tried = [*_candidates(largest, columns, channels, ties)], []
    for part in parts:
        weight = part.weight
        exact = part.statistics.sample @ weight
        tried.append([_grid(part.statistics, weight, exact, *candidate) for candidate in candidates])
    best = np.argmin([sum(choice.error**2 for choice in choices) for choices in zip(*tried, strict=True)])
    return [choices[best] for choices in tried]


def _candidates(largest: Floats, columns: Floats, channels: Ints, ties: Ints) -> Iterator[tuple[float, Floats]]:
    """Yield alphas and divisors to try; none divides the channels that nothing can divide."""
    others = np.delete(largest, channels)
    tied = _tied(largest, ties)[channels], _tied(columns, ties)[channels, None]
    for alpha in ALPHAS if len(channels) else ALPHAS[:1]:
        divisors = np.ones_like(largest)
        divisors[channels] = choose_divisors(*tied, alpha)
        yield alpha, divisors
        if len(others) and alpha:  # as large as the others, whose grid they share
            level = float((largest / divisors)[channels].max() / max(float(others.max()), 1e-5))
            divisors = divisors.copy()
            divisors[channels] *= max(level, 1e-5)
            yield alpha, divisors


def _tied(values: Floats, ties: Ints) -> Floats:
    """Return for each channel the largest value of all that are tied to it."""
    most = np.zeros(int(ties.max()) + 1, values.dtype)
    np.maximum.at(most, ties, values)
    return most[ties]


def _grid(statistics: LayerStatistics, weight: Floats, exact: Floats, alpha: float, divisors: Floats) -> Chosen:
    """Return the step of least error for these divisors."""
    scale = float(np.linalg.norm(exact)) or 1.0
    sample, scaled = statistics.sample / divisors, fake_weight(weight * divisors[:, None])
    largest = float((statistics.largest / divisors).max()) or 1.0
    choices = []
    for shrink in SHRINKS:
        step = HEADROOM * shrink * largest / LEVELS
        grid = np.clip(np.rint(sample / step), -LEVELS, LEVELS) * step
        choices.append(Chosen(alpha, divisors, step, float(np.linalg.norm(grid @ scaled - exact)) / scale, largest))
    return min(choices, key=lambda choice: choice.error)


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
    """Choose for every layer and fold the divisors into the graphs, whose function stays what it was.

    `stages` are the graphs before the loop, which make the vectors that the denoiser reads.
    """
    layers = find(denoiser)
    own_weights(layers)
    if missing := [layer.name for layer in layers if layer.name not in calibration.layers]:
        raise UsageError(f"the calibration has no {missing[0]}; it was made for another network")
    chosen: dict[str, Chosen] = {}
    for group in grouped(layers):
        parts = [_part(readers, calibration) for readers in group.inputs]
        choices = choose(parts, group.channels, _ties(group, len(parts[0].statistics.largest)))
        for readers, choice in zip(group.inputs, choices, strict=True):
            chosen |= {layer.name: choice for layer in readers}
        divisors = choices[0].divisors
        if (divisors == 1).all():
            continue
        for layer in group.layers:
            axis = 1 if layer.is_convolution else 0
            _divide(layer.node, 1, axis, np.arange(len(divisors)), np.float32(1) / divisors)
        vectors = group.vectors
        for place in group.places:
            tensor = place.node.inputs[place.input]
            if isinstance(tensor, gs.Constant):
                _divide(place.node, place.input, place.axis, place.at, divisors[place.channels])
            elif id(tensor) in vectors:  # that several blocks read
                vectors.remove(id(tensor))
                _divide_vector(stages, place, divisors)
    return chosen


def _part(readers: Sequence[Layer], calibration: Calibration) -> Part:
    """Return the calibration's statistics of a tensor, and the weights of all layers that read it."""
    statistics, matrices = calibration.layers[readers[0].name], [layer.matrix for layer in readers]
    if len(statistics.largest) != len(matrices[0]):
        got, expected = len(statistics.largest), len(matrices[0])
        raise UsageError(f"the calibration's {readers[0].name} has {got} channels, expected {expected}")
    return Part(statistics, matrices)


def _ties(group: Group, count: int) -> Ints:
    """Return a number for each of `count` channels, one for all that a place makes of one of its own."""
    ties = np.arange(count)
    for place in group.places:
        least = np.full(int(place.at.max()) + 1, count)
        np.minimum.at(least, place.at, ties[place.channels])
        ties[place.channels] = least[place.at]
    return ties


def _divide(node: gs.Node, index: int, axis: int, at: Ints, divisors: Floats) -> None:
    """Divide channels of a node's parameter; no other node reads it then, for the exporter lets equal ones share."""
    tensor = node.inputs[index]
    values = np.moveaxis(np.array(tensor.values), axis, -1)
    values[..., at] = values[..., at] / divisors
    name = tensor.name if len(tensor.outputs) == 1 else f"{node.outputs[0].name}.{index}"
    node.inputs[index] = gs.Constant(name, np.ascontiguousarray(np.moveaxis(values, -1, axis)))


def _divide_vector(stages: Sequence[gs.Graph], place: Place, divisors: Floats) -> None:
    """Divide the vector where it is made, so that nothing is added inside the loop."""
    vector = place.node.inputs[place.input]
    (split,) = vector.inputs
    name = unmoved(split.inputs[0]).name
    graph, packed = next(
        (graph, tensor.inputs[0]) for graph in stages for tensor in graph.outputs if tensor.name == name
    )
    index = split.outputs.index(vector)
    made, factors = packed.inputs[index], np.ones(vector.shape[-1], np.float32)
    factors[place.at] = 1 / divisors[place.channels]
    packed.inputs[index] = onnxfile.layer(graph, "Mul", [made, factors], f"{made.name}_smoothed")
    graph.toposort()


def pack_divisors(denoiser: gs.Graph, chosen: Mapping[str, Chosen]) -> dict[str, Floats]:
    """Return, per pack that the denoiser reads, the divisor of each vector, (K, D), for comparing with PyTorch's."""
    divisors: dict[str, Floats] = {}
    for group in grouped(find(denoiser)):
        for place in group.places:
            vector = place.node.inputs[place.input]
            if not isinstance(vector, gs.Constant):
                (split,) = vector.inputs
                sizes, name = split.inputs[1].values, unmoved(split.inputs[0]).name
                table = divisors.setdefault(name, np.ones((int(sizes.sum()), vector.shape[-1]), np.float32))
                rows = np.split(table, np.cumsum(sizes)[:-1])[split.outputs.index(vector)]
                rows[:, place.at] = chosen[group.layers[0].name].divisors[place.channels]
    return divisors
