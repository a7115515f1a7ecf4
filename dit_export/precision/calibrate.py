"""What the token GEMMs see while the sampler itself runs: solver, guidance, conditional and null rows, all timesteps.

The denoiser is run with taps: each GEMM's input leaves it as its largest magnitude a channel, and as a few rows. So
XL/2 keeps no activations in memory, only 112 vectors and a bounded sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from dit_export.arrays import read_arrays
from dit_export.graph import onnxfile
from dit_export.graph.onnxfile import layer
from dit_export.precision.layers import find
from dit_export.precision.prompts import Prompts
from dit_runtime import backends
from dit_runtime.backends import Engine, Options
from dit_runtime.bundle import manifest
from dit_runtime.captions import Captions
from dit_runtime.errors import UsageError
from dit_runtime.pipeline import Pipeline

BACKEND = "onnxruntime"
TOKENS = 8  # of a picture, from which a step's sample is drawn
ROWS = 256  # of each layer's inputs that are kept in all: of XL/2's 115 MB, as float16
END = float(np.finfo(np.float16).max)
LARGEST, SAMPLE, OUTPUT = "/largest", "/sample", "/output"  # ends of the taps' names
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    largest: Floats  # (K,): magnitude a channel, over everything
    sample: Floats  # (rows, K)
    output: Floats | None = None  # (N,): magnitude a channel of what comes out; of qkv alone


@dataclass(frozen=True)
class Calibration:
    layers: Mapping[str, Seen]  # by Layer.name
    provenance: Mapping[str, Any]

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {f"{name}{LARGEST}": seen.largest for name, seen in self.layers.items()}
        arrays |= {f"{name}{SAMPLE}": seen.sample.astype(np.float16) for name, seen in self.layers.items()}
        arrays |= {f"{name}{OUTPUT}": seen.output for name, seen in self.layers.items() if seen.output is not None}
        arrays["provenance"] = np.array(repr(dict(self.provenance)))
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        what = "a calibration, as `dit-export quantize` writes it"
        arrays = read_arrays(path, what)
        names = [key.removesuffix(LARGEST) for key in arrays if key.endswith(LARGEST)]
        try:
            layers = {
                name: Seen(
                    arrays[f"{name}{LARGEST}"],
                    arrays[f"{name}{SAMPLE}"].astype(np.float32),
                    arrays.get(f"{name}{OUTPUT}"),
                )
                for name in names
            }
            return cls(layers, {"file": path.name, "made": str(arrays["provenance"])})
        except (KeyError, ValueError) as error:
            raise UsageError(f"{path}: not {what}: {error}") from None


@dataclass(frozen=True)
class Plan:
    """Many classes and seeds with few steps: ranges differ more between pictures than between neighbouring steps."""

    pictures: int = 24
    steps: int = 6
    guidance: float = 4.0
    seed: int = 1000  # not one of the reference's
    batch: int = 4


def calibrate(
    folder: Path, plan: Plan, on_step: Callable[[int, int], None], prompts: Prompts | None = None
) -> Calibration:
    """Runs the fp32 bundle in `folder` from noise to latents, and looks on.

    Pictures are of classes or, with `prompts`, of the user's own captions, as many as there are pictures and spread
    evenly; the last few then of the made-up ones, for those are what the gates ask.
    """
    tapped = folder / "tapped.onnx"
    rng = np.random.default_rng(plan.seed)
    contract = manifest.read(folder)
    patches = math.prod(contract.latent_shape[1:]) // contract.model["patch"] ** 2
    names = add_taps(graph := onnxfile.load(folder / "denoiser.onnx"), patches, rng)
    files = onnxfile.save(graph, tapped)
    classes, done, total = contract.num_classes, 0, -(-plan.pictures // plan.batch) * plan.steps
    own = (plan.pictures - 1) // plan.batch * plan.batch  # the pictures of all batches but the last
    denoiser: Engine = backends.backend(BACKEND).open([folder / file for file in files], Options())
    watcher = Watcher(denoiser, names, max(1, ROWS // total), rng)
    with Pipeline(folder, contract, {"denoiser": watcher}) as watched:
        stride = max(1, classes // plan.pictures)  # spread over the classes
        options: dict[str, Any] = {"steps": plan.steps, "guidance": plan.guidance, "output": "latents"}
        for first in range(0, plan.pictures, plan.batch):
            last = min(first + plan.batch, plan.pictures)
            chosen: dict[str, Any] = {"labels": [index * stride % classes for index in range(first, last)]}
            if prompts is not None and last <= own:
                which = [index * len(prompts.captions.mask) // own for index in range(first, last)]
                captions = Captions(*(part[which] for part in prompts.captions))
                chosen = {"captions": captions, "negative": prompts.negative}

            def tick(*_: object) -> None:
                nonlocal done
                done += 1
                on_step(done, total)

            watched.sample(**chosen, **options, seed=plan.seed + first, on_step=tick)
    return Calibration(watcher.seen(), {"plan": str(plan), "source": str(contract.source)})


def add_taps(graph: gs.Graph, tokens: int, rng: np.random.Generator) -> list[str]:
    """Adds the outputs that calibration reads; returns the layers' names."""
    layers = find(graph)
    places = [np.sort(rng.choice(tokens, min(TOKENS, tokens), replace=False)) for _ in layers]
    for one, kept in reversed(list(zip(layers, places, strict=True))):  # as `peaks.tap` does, and for its reason
        sample = layer(graph, "Gather", [one.x, kept], f"{one.name}{SAMPLE}", axis=1)
        taps = [(sample, ["rows", len(kept), one.x.shape[-1]])]
        for tensor, end in ((one.x, LARGEST), (one.y, OUTPUT)) if one.kind == "qkv" else ((one.x, LARGEST),):
            magnitude = layer(graph, "Abs", [tensor], f"{one.name}{end}/abs")
            largest = layer(graph, "ReduceMax", [magnitude, np.array([0, 1])], f"{one.name}{end}", keepdims=0)
            taps.append((largest, [tensor.shape[-1]]))
        for tap, shape in taps:
            tap.dtype, tap.shape = np.dtype(np.float32), shape
            graph.outputs.append(tap)
    return [one.name for one in layers]


class Watcher:
    """A tapped denoiser as an engine: its own outputs go on, of the taps' each call leaves a bounded share."""

    def __init__(self, engine: Engine, names: list[str], rows_a_call: int, rng: np.random.Generator) -> None:
        self._engine, self._names, self._rows, self._rng = engine, names, rows_a_call, rng
        self._largest: dict[str, Floats] = {}  # by the taps' whole names
        self._samples: dict[str, list[NDArray[np.float16]]] = {name: [] for name in names}

    @property
    def io(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        inputs, outputs = self._engine.io
        return inputs, tuple(name for name in outputs if not name.endswith((LARGEST, SAMPLE, OUTPUT)))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._engine.run(inputs)
        for name in [name for name in outputs if name.endswith((LARGEST, OUTPUT))]:
            largest = outputs.pop(name)
            self._largest[name] = np.maximum(self._largest.get(name, largest), largest)
        for name in self._names:
            sample = outputs.pop(f"{name}{SAMPLE}")
            rows = sample.reshape(-1, sample.shape[-1])  # conditional rows first, then null ones
            kept = self._rng.choice(len(rows), min(self._rows, len(rows)), replace=False)
            self._samples[name].append(np.clip(rows[kept], -END, END).astype(np.float16))
        return outputs

    def seen(self) -> dict[str, Seen]:
        return {
            name: Seen(
                self._largest[f"{name}{LARGEST}"],
                np.concatenate(self._samples[name]).astype(np.float32),
                self._largest.get(f"{name}{OUTPUT}"),
            )
            for name in self._names
        }

    def close(self) -> None:
        self._engine.close()
