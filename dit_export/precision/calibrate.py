"""Statistics of what layers and convolutions read, from which int8 and fp8 are planned; `measure.py` records them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from dit_export.arrays import read_arrays
from dit_export.graph import onnxfile
from dit_export.precision.layers import Layer
from dit_runtime.errors import UsageError
from dit_runtime.files import beside

TOKENS = 8  # of a picture, from which a step's sample is drawn
END = float(np.finfo(np.float16).max)
LARGEST, LOWEST, SAMPLE, OUTPUT = "/largest", "/lowest", "/sample", "/output"  # ends of the taps' names
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LayerStatistics:
    largest: Floats  # (K,): magnitude a channel, over everything
    sample: Floats  # (rows, K)
    output: Floats | None = None  # (N,): magnitude a channel of the layer's output, where attention scores read it
    lowest: Floats | None = None  # (K,): value a channel, of a convolution's input


@dataclass(frozen=True)
class Calibration:
    layers: Mapping[str, LayerStatistics]  # by Layer.name
    provenance: Mapping[str, Any]

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {f"{name}{LARGEST}": layer.largest for name, layer in self.layers.items()}
        arrays |= {f"{name}{SAMPLE}": layer.sample.astype(np.float16) for name, layer in self.layers.items()}
        arrays |= {f"{name}{OUTPUT}": layer.output for name, layer in self.layers.items() if layer.output is not None}
        arrays |= {f"{name}{LOWEST}": layer.lowest for name, layer in self.layers.items() if layer.lowest is not None}
        arrays["provenance"] = np.array(repr(dict(self.provenance)))
        with beside(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        what = "a calibration, as `dit-export quantize` writes it"
        arrays = read_arrays(path, what)
        names = [key.removesuffix(LARGEST) for key in arrays if key.endswith(LARGEST)]
        try:
            layers = {
                name: LayerStatistics(
                    arrays[f"{name}{LARGEST}"],
                    arrays[f"{name}{SAMPLE}"].astype(np.float32),
                    arrays.get(f"{name}{OUTPUT}"),
                    arrays.get(f"{name}{LOWEST}"),
                )
                for name in names
            }
            return cls(layers, {"file": path.name, "made": str(arrays["provenance"])})
        except (KeyError, ValueError) as error:
            raise UsageError(f"{path}: not {what}: {error}") from None


def add_layer_taps(graph: gs.Graph, layers: Sequence[Layer], rng: np.random.Generator) -> None:
    """Add the outputs that calibration reads."""
    for layer in layers:
        x = _channels_last(graph, layer)
        count = int(x.shape[1])
        chosen = np.sort(rng.choice(count, min(TOKENS, count), replace=False))
        sample = onnxfile.layer(graph, "Gather", [x, chosen], f"{layer.name}{SAMPLE}", axis=1)
        taps = [(sample, ["rows", len(chosen), *x.shape[2:]])]
        for tensor, end in ((x, LARGEST), (layer.y, OUTPUT)) if layer.scores else ((x, LARGEST),):
            magnitude = onnxfile.layer(graph, "Abs", [tensor], f"{layer.name}{end}/abs")
            axes = np.arange(len(tensor.shape) - 1)  # all but the channels
            largest = onnxfile.layer(graph, "ReduceMax", [magnitude, axes], f"{layer.name}{end}", keepdims=0)
            taps.append((largest, [tensor.shape[-1]]))
        for tap, shape in taps:
            tap.dtype, tap.shape = np.dtype(np.float32), shape
            graph.outputs.append(tap)


def _channels_last(graph: gs.Graph, layer: Layer) -> gs.Variable:
    if not layer.is_convolution:
        return layer.x
    rows, channels, *sides = layer.x.shape
    x = onnxfile.layer(graph, "Transpose", [layer.x], f"{layer.name}/last", perm=[0, 2, 3, 1])
    x.dtype, x.shape = layer.x.dtype, [rows, *sides, channels]
    return x


def choose_rows(sample: NDArray[Any], count: int, rng: np.random.Generator) -> NDArray[np.float16]:
    """Return `count` random rows of a call's sample, conditional and null ones alike, as float16."""
    rows = sample.reshape(-1, sample.shape[-1])
    chosen = rng.choice(len(rows), min(count, len(rows)), replace=False)
    return np.clip(rows[chosen], -END, END).astype(np.float16)


def collect(
    largest: Mapping[str, Floats], samples: Mapping[str, Sequence[NDArray[np.float16]]]
) -> dict[str, LayerStatistics]:
    """Return the statistics by layer, from what the taps recorded under their whole names."""
    names = [name.removesuffix(SAMPLE) for name in samples]
    return {
        name: LayerStatistics(
            largest[f"{name}{LARGEST}"],
            np.concatenate(samples[f"{name}{SAMPLE}"]).astype(np.float32),
            largest.get(f"{name}{OUTPUT}"),
            largest.get(f"{name}{LOWEST}"),
        )
        for name in names
    }
