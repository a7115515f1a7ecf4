"""The decoder's convolutions in int8:

    conv(x, W) ≈ conv(DQ(Q(x)), DQ(W8)),  Q(x) = x / (s step) + zero,  W8 = Q(s W)

The weights have a step an output channel. The activations are u8 with one step and one zero point a tensor: the values
of SiLU begin at −0.28, and a symmetric grid would waste half of its levels. The divisors s smooth the input's channels.
No divisor can pass SiLU, and what an upsampling reads is the residual stream. So s stands in the steps of Q itself, one
a channel, where it costs nothing. ONNX Runtime's kernel also rounds its output to u8.

The first and the last convolution stay float: they have few channels, and the whole picture passes through them. So do
those of 1 × 1, whose input takes as long to quantize as to multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from dit_export.graph import onnxfile
from dit_export.passes import LOWERINGS
from dit_export.precision.attention import Pass
from dit_export.precision.calibrate import LARGEST, LOWEST, OUTPUT, SAMPLE, Calibration, LayerStatistics
from dit_export.precision.halving import fewest
from dit_export.precision.layers import DECODER, resolve
from dit_export.precision.smooth import ALPHAS, HEADROOM, LEVELS, choose_divisors
from dit_runtime import backends, images
from dit_runtime.backends import Options
from dit_runtime.errors import UsageError

BACKENDS = ("onnxruntime", "openvino")  # where it was measured to gain
MIDDLE = LEVELS + 1  # of u8: the zero point of outputs, which are signed
BIASES = 2**30  # the largest that is stored
LINES = 6  # of a picture, and columns: where they cross, a call's sample is drawn
SAMPLES, SEED = 2, 2000  # latents of the search; the seed is not calibration's
MEASURED = 8  # convolutions of the search, each of which costs a compilation and a picture
STREAM = 2.0  # how much more an error of the residual stream counts than that of a branch beside it
MARGIN = 1.5  # dB that the search stays above the limit: other latents, and a CPU whose floats are bf16
UP = "up"  # the kind of a sub-pixel convolution, which is four
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Convolution:
    """A convolution, or the four that a sub-pixel convolution is made of."""

    name: str
    nodes: tuple[gs.Node, ...]  # Conv(x, W, b) with a constant W [N, K, h, w]

    @property
    def x(self) -> gs.Variable:
        return self.nodes[0].inputs[0]

    @property
    def y(self) -> gs.Variable:
        """Return the output, or those of all four in one tensor."""
        (out,) = self.nodes[0].outputs
        return out if len(self.nodes) == 1 else out.outputs[0].outputs[0]

    @property
    def weights(self) -> list[Floats]:
        return [np.asarray(node.inputs[1].values) for node in self.nodes]


class Choice(NamedTuple):
    """The quantization of a convolution's input."""

    divisors: Floats  # (K,)
    step: float  # of the grid, after the division
    zero: int  # the level of 0
    error: float  # relative L2 of the output on the calibration's rows
    outputs: Floats  # step of each output channel's grid, where outputs have one; (N,), or (4 N,) of four kernels


class FloatConvolutions(NamedTuple):
    """The outcome of the search for convolutions that stay float."""

    kept: list[str]  # in float
    quantized: int
    psnr: float | None  # dB of the worst picture; None: no convolution is quantized, and nothing was tried


def find(decoder: gs.Graph) -> list[Convolution]:
    """Return the convolutions over pixels that int8 may have, in the graph's order.

    Convolutions over frames stay float, and those of single channels, which are a small part of the work.
    """
    readers: dict[int, list[gs.Node]] = {}  # by id of what they read
    for node in decoder.nodes:
        if node.op == "Conv" and isinstance(node.inputs[1], gs.Constant) and _over_pixels(node):
            readers.setdefault(id(node.inputs[0]), []).append(node)
    layers: list[Convolution] = []
    for nodes in list(readers.values())[1:-1]:
        kind = f"{DECODER} {'conv' if len(nodes) == 1 else UP}"
        count = sum(layer.name.startswith(kind) for layer in layers)
        layers.append(Convolution(f"{kind} {count}", tuple(nodes)))
    return layers


def _over_pixels(conv: gs.Node) -> bool:
    """Return whether a convolution of all channels in two dimensions sees more than one pixel."""
    shape = conv.inputs[1].shape
    return len(shape) == 4 and max(shape[2:]) > 1 and conv.attrs.get("group", 1) == 1


def kernels(name: str) -> int:
    """Return how many convolutions a name stands for."""
    return 4 if name.split()[1] == UP else 1


def named(layers: Sequence[Convolution], entries: Collection[str]) -> list[str]:
    """Return the convolutions that a recipe's entries mean: "decoder conv 3", "decoder up", or "decoder".

    `layers` is empty where the decoder is not quantized.
    """
    meanings = {layer.name: {" ".join(layer.name.split()[:count]) for count in (1, 2, 3)} for layer in layers}
    mine = [entry for entry in entries if entry.split()[:1] == [DECODER]]
    if mine and not layers:
        raise UsageError(f"layer {mine[0]!r}: this build has no decoder in int8; expected entries of the denoiser only")
    return resolve(meanings, mine, "decoder", '"decoder conv 0", "decoder up" or "decoder"')


def add_convolution_taps(graph: gs.Graph, layers: Sequence[Convolution], rng: np.random.Generator) -> None:
    """Add the outputs that calibration reads."""
    for layer in layers:
        channels = layer.weights[0].shape[1]
        sample: gs.Tensor = layer.x
        chosen = [np.sort(rng.choice(size, min(LINES, size), replace=False)) for size in map(int, layer.x.shape[2:])]
        for axis, places in enumerate(chosen, 2):
            sample = onnxfile.layer(graph, "Gather", [sample, places], f"{layer.name}/{axis}", axis=axis)
        sample = onnxfile.layer(graph, "Transpose", [sample], f"{layer.name}{SAMPLE}", perm=[0, 2, 3, 1])
        taps = [(sample, ["rows", *map(len, chosen), channels])]
        for tensor, op, end, count in (
            (layer.x, "ReduceMin", LOWEST, channels),
            (layer.x, "ReduceMax", LARGEST, channels),
            (layer.y, "ReduceMax", OUTPUT, sum(map(len, layer.weights))),
        ):
            values = tensor if op == "ReduceMin" else onnxfile.layer(graph, "Abs", [tensor], f"{layer.name}{end}/abs")
            over = np.array([0, 2, 3])
            taps.append((onnxfile.layer(graph, op, [values, over], f"{layer.name}{end}", keepdims=0), [count]))
        for tap, shape in taps:
            tap.dtype, tap.shape = np.dtype(np.float32), shape
            graph.outputs.append(tap)


def choose(layers: Sequence[Convolution], calibration: Calibration) -> dict[str, Choice]:
    """Return, by convolution, the divisors and the grid whose output has the least error on the calibration's rows."""
    if missing := [layer.name for layer in layers if layer.name not in calibration.layers]:
        raise UsageError(f"the calibration has no {missing[0]}; it was made for another decoder: calibrate anew")
    chosen = {}
    for layer in layers:
        statistics, channels = calibration.layers[layer.name], layer.weights[0].shape[1]
        if statistics.lowest is None or statistics.output is None or statistics.largest.shape != (channels,):
            raise UsageError(f"the calibration's {layer.name} is of another decoder, expected {channels} channels")
        chosen[layer.name] = _choose(statistics, layer.weights)
    return chosen


def _choose(statistics: LayerStatistics, weights: Sequence[Floats]) -> Choice:
    """Try each alpha, with the kernel's places as outputs of their own: rows are pixels."""
    assert statistics.lowest is not None and statistics.output is not None
    rows = statistics.sample  # (rows, K)
    exact, best = rows @ _flat(weights), None
    outputs = (HEADROOM * np.maximum(statistics.output, 1e-12) / LEVELS).astype(np.float32)
    scale = float(np.linalg.norm(exact)) or 1.0
    for alpha in ALPHAS:
        s = choose_divisors(statistics.largest, _flat(weights), alpha)
        scaled = _flat([_stored(weight, s).astype(np.float32) * _steps(weight, s) for weight in weights])
        low, high = float(min((statistics.lowest / s).min(), 0)), float((statistics.largest / s).max()) or 1.0
        step = HEADROOM * (high - low) / (2 * LEVELS + 1)  # and nothing is cut off: rare pictures would pay for it
        zero = round(-low * HEADROOM / step)
        grid = (np.clip(np.rint(rows / s / step) + zero, 0, 2 * LEVELS + 1) - zero) * step
        error = float(np.linalg.norm(grid @ scaled - exact)) / scale
        if best is None or error < best.error:
            best = Choice(s, step, zero, error, outputs)
    assert best is not None
    return best


def _flat(weights: Sequence[Floats]) -> Floats:
    """(N, K, h, w) each -> (K, all N h w)."""
    return np.concatenate([weight.transpose(1, 0, 2, 3).reshape(weight.shape[1], -1) for weight in weights], axis=1)


def _steps(weight: Floats, s: Floats) -> Floats:
    """Return the grid of each output channel of s W, (N, 1, 1, 1)."""
    largest = np.abs(weight * s[:, None, None]).max(axis=(1, 2, 3), keepdims=True)
    return (np.maximum(largest, 1e-12) / LEVELS).astype(np.float32)


def _stored(weight: Floats, s: Floats) -> NDArray[np.int8]:
    return np.rint(weight * s[:, None, None] / _steps(weight, s)).astype(np.int8)


def quantize(decoder: gs.Graph, chosen: Mapping[str, Choice], keep: Collection[str] = ()) -> int:
    """Put every convolution but those to `keep` between Q and DQ; return how many."""
    layers = [layer for layer in find(decoder) if layer.name not in keep]
    for layer in layers:
        s, step, zero, *_ = chosen[layer.name]
        x, levels, level = layer.x, np.full(len(s), zero, np.uint8), np.array(zero, np.uint8)
        whole = onnxfile.layer(decoder, "QuantizeLinear", [x, s * np.float32(step), levels], f"{layer.name} q", axis=1)
        grid = onnxfile.layer(
            decoder, "DequantizeLinear", [whole, np.array(step, np.float32), level], f"{layer.name} x"
        )
        for node, weight in zip(layer.nodes, layer.weights, strict=True):
            steps = _steps(weight, s).ravel()
            stored = [_stored(weight, s), steps, np.zeros(len(steps), np.int8)]
            node.inputs[0] = grid
            node.inputs[1] = onnxfile.layer(decoder, "DequantizeLinear", stored, f"{node.outputs[0].name} W", axis=0)
    decoder.cleanup().toposort()
    return len(layers)


def passes(backend: str, layers: Sequence[Convolution], chosen: Mapping[str, Choice]) -> tuple[Pass, ...]:
    """Return the passes that make a backend's form of an int8 decoder; its layers are not quantized yet."""
    steps: dict[str, Floats] = {}
    for layer in layers:
        parts = np.split(chosen[layer.name].outputs, len(layer.nodes))
        steps |= {node.outputs[0].name: part for node, part in zip(layer.nodes, parts, strict=True)}

    def quantize_outputs(graph: gs.Graph) -> int:
        """The kernel has one step for its output; steps a channel are in the scales of the weights instead."""
        matches = [node for node in graph.nodes if node.op == "Conv" and node.inputs[1].inputs]
        for node in matches:
            (x, step, zero), (weight, scales, zeros) = (tensor.inputs[0].inputs for tensor in node.inputs[:2])
            (out,) = node.outputs
            node.outputs.clear()
            unit = np.asarray(scales.values) * float(step.values)
            biases = [np.clip(np.rint(bias.values / unit), -BIASES, BIASES) for bias in node.inputs[2:]]
            ends, one, level = steps[out.name], np.ones((), np.float32), np.array(MIDDLE, np.uint8)
            reads = [x, step, zero, weight, scales.values / ends, zeros, one, level]
            reads += [bias.astype(np.int32) for bias in biases]
            whole = onnxfile.layer(graph, "QLinearConv", reads, f"{out.name} q", **node.attrs)
            levels = onnxfile.layer(graph, "DequantizeLinear", [whole, one, level], f"{out.name} levels")
            onnxfile.layer(graph, "Mul", [levels, ends.reshape(1, -1, 1, 1)], out)
        graph.cleanup().toposort()
        return len(matches)

    return (divide_apart, quantize_outputs, *LOWERINGS[backend]) if backend == "onnxruntime" else LOWERINGS[backend]


def divide_apart(graph: gs.Graph) -> int:
    """Give each Q one step behind a Mul, since kernels with a step a channel are slow; return how many changed."""
    matches = [node for node in graph.nodes if node.op == "QuantizeLinear" and node.inputs[1].values.ndim]
    for node in matches:
        x, steps, _ = node.inputs
        (grid,) = node.outputs[0].outputs
        _, step, zero = grid.inputs
        factors = (step.values / steps.values).reshape(1, -1, *[1] * (len(x.shape) - 2))
        node.inputs = [onnxfile.layer(graph, "Mul", [x, factors], f"{node.outputs[0].name} x"), step, zero]
        del node.attrs["axis"]
    graph.cleanup().toposort()
    return len(matches)


def fewest_in_float(
    decoder: gs.Graph,
    chosen: Mapping[str, Choice],
    fixed: Collection[str],
    backend: str,
    folder: Path,
    decode: Callable[[Floats], Floats],
    limit: float,
    on_try: Callable[[int, int], None],
) -> FloatConvolutions:
    """Choose the convolutions that stay float, `fixed` among them.

    As few of the others stay float as `limit` needs, and `decode` is PyTorch's decoder. If it needs some, those of the
    largest errors are measured: each stays float alone, and those that gain most come first. The number is found by
    halving.
    """
    names = [name for name in chosen if name not in fixed]
    if not names:
        return FloatConvolutions([*chosen], 0, None)
    rng, (reads,) = np.random.default_rng(SEED), decoder.inputs
    rewrites = passes(backend, find(decoder), chosen)
    latents = rng.normal(size=(SAMPLES, *reads.shape[1:])).astype(np.float32)
    exact, done = decode(latents), 0
    most = 2 + min(MEASURED, len(names)) + len(names).bit_length()  # none, all, each alone, and the halving

    def psnr(keep: Collection[str], samples: int = SAMPLES) -> float:
        nonlocal done
        done += 1
        on_try(done, most)
        form = decoder.copy()
        quantize(form, chosen, {*fixed, *keep})
        for rewrite in rewrites:
            rewrite(form)
        with onnxfile.temporary(form, folder / "decoder.tried.onnx") as files:
            engine = backends.backend(backend).open(files, Options(precision="int8"))
            try:
                pictures = [engine.run({reads.name: row[None]})["images"][0] for row in latents[:samples]]
            finally:
                engine.close()
        return min(images.psnr(*pair, peak=1.0) for pair in zip(pictures, exact, strict=False))

    values, count = {0: psnr(())}, 0
    order: list[str] = []
    if values[0] < limit:
        order = sorted(names, key=lambda name: -chosen[name].error * (STREAM if kernels(name) > 1 else 1))
        gains = {name: psnr([name], 1) for name in order[:MEASURED]}
        order = [*sorted(gains, key=lambda name: -gains[name]), *order[MEASURED:]]
        values[len(order)] = psnr(order)

        def holds(count: int) -> bool:
            values[count] = psnr(order[:count])
            return values[count] >= limit

        count = fewest(len(order), holds)
    in_float = [name for name in chosen if name in fixed or name in order[:count]]
    return FloatConvolutions(in_float, len(chosen) - len(in_float), round(values[count], 2))
