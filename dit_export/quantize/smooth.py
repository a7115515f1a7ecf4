"""Smoothing (Xiao et al., arXiv 2211.10438) that costs nothing at run time:

    x W = (x / s) (s W),  s_k = max|x_k|^alpha / max|W_k|^(1 − alpha)

for each input channel k of a GEMM. The division folds into what makes x: the gain and the shift that the hoisted
conditioner gives for qkv and fc1, the rows of W_v and b_v for proj (a convex mix of v's rows is proj's input). Between
GELU and fc2 nothing can be folded. alpha is searched for each GEMM, as is the step of its activations' grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from dit_export.fuse.gains import linear_columns
from dit_export.quantize.calibrate import Calibration, Seen
from dit_export.quantize.layers import Layer, find
from dit_runtime.errors import UsageError

ALPHAS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHRINKS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the largest magnitude: to clip may cost less than coarse steps
HEADROOM = 1.1  # other classes and seeds reach further; a value that is cut off costs more than a step 10 % coarser
LEVELS = 127  # of symmetric int8
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Chosen:
    """How one GEMM's input is quantized."""

    alpha: float
    divisors: Floats  # (K,)
    step: float  # of the activations' grid, after the division
    error: float  # relative L2 of the GEMM's output on the calibration's rows
    largest: float = 0.0  # magnitude of the input, after the division


def choose(seen: Seen, weight: Floats, smooth: bool) -> Chosen:
    """The alpha and the step with the least error of the quantized product on the calibration's rows."""
    best: Chosen | None = None
    exact = seen.sample @ weight
    scale = float(np.linalg.norm(exact)) or 1.0
    for alpha in ALPHAS if smooth else ALPHAS[:1]:
        divisors = _divisors(seen.largest, weight, alpha)
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


def _divisors(largest: Floats, weight: Floats, alpha: float) -> Floats:
    if alpha == 0:
        return np.ones_like(largest)
    columns = np.abs(weight).max(axis=1)
    s = np.maximum(largest, 1e-5) ** alpha / np.maximum(columns, 1e-5) ** (1 - alpha)
    s /= np.exp(np.log(s).mean())  # around 1: what is folded keeps its size
    return s.astype(np.float32)


def weight_steps(weight: Floats, end: float = LEVELS) -> Floats:
    """(N,): the grid of each output channel, whose largest number is `end`."""
    return (np.maximum(np.abs(weight).max(axis=0), 1e-12) / end).astype(np.float32)


def fake_weight(weight: Floats) -> Floats:
    steps = weight_steps(weight)
    return np.rint(weight / steps) * steps


def smooth(conditioner: gs.Graph, denoiser: gs.Graph, calibration: Calibration, fold: bool = True) -> dict[str, Chosen]:
    """Chooses for every token GEMM and folds the divisors into both graphs, whose function stays what it was."""
    layers = find(denoiser)
    if missing := [one.name for one in layers if one.name not in calibration.layers]:
        raise UsageError(f"the calibration has no {missing[0]}; it was made for another network")
    chosen, qkv = {}, None
    for one in layers:
        seen, weight = calibration.layers[one.name], np.array(one.weight.values)
        if seen.largest.shape != weight.shape[:1]:
            raise UsageError(f"the calibration's {one.name} has {len(seen.largest)} channels, expected {len(weight)}")
        if one.kind == "qkv":
            qkv = one
        choice = choose(seen, weight, fold and one.kind != "fc2")
        chosen[one.name] = choice
        if (choice.divisors == 1).all():
            continue
        one.weight.values = weight * choice.divisors[:, None]
        if one.kind == "proj":
            assert qkv is not None
            _divide_values(qkv, choice.divisors)
        else:
            _divide_modulation(conditioner, denoiser, one, choice.divisors)
    return chosen


def _divide_values(qkv: Layer, divisors: Floats) -> None:
    """The last third of qkv's columns makes v."""
    width = len(divisors)
    for constant in (qkv.weight, qkv.bias):
        values = np.array(constant.values)
        values[..., -width:] /= divisors
        constant.values = values


def _divide_modulation(conditioner: gs.Graph, denoiser: gs.Graph, layer: Layer, divisors: Floats) -> None:
    """x = LN · gain + shift: both vectors' columns in the conditioner's linear, weight and bias."""
    vectors = next(node for node in denoiser.nodes if node.op == "Split" and node.inputs[0].name == "conditioning_rows")
    packed = next(node for node in conditioner.nodes if node.op == "Concat" and node.outputs[0] in conditioner.outputs)
    for tensor in _modulators(layer.x):
        made = packed.inputs[vectors.outputs.index(tensor)]
        linear = linear_columns(conditioner, made)
        if linear is None:
            raise RuntimeError(f"{layer.name}: {made.name!r} is no part of a linear; its divisors cannot be folded")
        gemm, columns = linear
        if not gemm.attrs.get("transB", 0):
            raise RuntimeError(f"{layer.name}: expected the conditioner's linear as [N, K]")
        weight, bias = (np.array(tensor.values) for tensor in gemm.inputs[1:])
        weight[columns] /= divisors[:, None]
        bias[columns] /= divisors
        gemm.inputs[1], gemm.inputs[2] = (
            gs.Constant(f"{gemm.outputs[0].name}.{name}", values) for name, values in (("w", weight), ("b", bias))
        )


def _modulators(x: gs.Variable) -> list[gs.Variable]:
    """Shift and gain in Add(Mul(LN, gain), shift)."""
    add = x.inputs[0]
    product = next(tensor for tensor in add.inputs if tensor.inputs and tensor.inputs[0].op == "Mul")
    shift = next(tensor for tensor in add.inputs if tensor is not product)
    gain = next(tensor for tensor in product.inputs[0].inputs if tensor.inputs and tensor.inputs[0].op == "Split")
    return [shift, gain]


def vector_divisors(denoiser: gs.Graph, chosen: Mapping[str, Chosen], vectors: int, width: int) -> Floats:
    """(K, D): by what each conditioning vector was divided; for comparing with what PyTorch computes."""
    table = np.ones((vectors, width), np.float32)
    split = next(node for node in denoiser.nodes if node.op == "Split" and node.inputs[0].name == "conditioning_rows")
    for one in find(denoiser):
        if one.kind in ("qkv", "fc1"):
            for tensor in _modulators(one.x):
                table[split.outputs.index(tensor)] = chosen[one.name].divisors
    return table
