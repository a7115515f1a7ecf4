"""Which tensors fp16 cannot hold: the largest magnitude that each reaches while the sampler itself runs.

fp16 ends at 65504. Other seeds and classes reach further than those seen here, so what comes within a factor of 4 of
the end stays fp32. bf16 has fp32's range, and nothing to look for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.graph import onnxfile
from dit_export.graph.onnxfile import layer
from dit_export.precision.calibrate import BACKEND, Plan
from dit_export.precision.half import watched
from dit_runtime import backends
from dit_runtime.backends import Engine, Options
from dit_runtime.bundle import manifest
from dit_runtime.pipeline import Pipeline

PLAN = Plan(pictures=4, steps=10, batch=4)
MARGIN = 4
ENDS = {"fp16": float(np.finfo(np.float16).max)}  # types that end before fp32 does
TYPED = ("denoiser", "decoder")  # what is computed before the loop stays fp32
TAP = "/peak"


def near_the_end(peaks: Mapping[str, float], precision: str) -> dict[str, float]:
    """The tensors to keep wide; NaN among them, for nothing is known of it."""
    limit = ENDS[precision] / MARGIN
    return {name: peak for name, peak in peaks.items() if not peak <= limit}


def peaks(folder: Path, plan: Plan, on_step: Callable[[int, int], None]) -> dict[str, dict[str, float]]:
    """By graph and tensor, from runs of the fp32 bundle in `folder`, every timestep of them."""
    contract = manifest.read(folder)
    watchers = {name: Watcher(folder, name) for name in TYPED if name in contract.graphs}
    with Pipeline(folder, contract, watchers) as tapped:
        stride = max(1, contract.num_classes // plan.pictures)
        labels = [index * stride % contract.num_classes for index in range(plan.pictures)]
        tapped.sample(
            labels,
            steps=plan.steps,
            guidance=plan.guidance,
            seed=plan.seed,
            output="images" if "decoder" in contract.graphs else "latents",
            on_step=lambda step, steps, _: on_step(step, steps),
        )
    return {name: watcher.peaks for name, watcher in watchers.items()}


class Watcher:
    """A graph with taps, as an engine: its own outputs go on, of the taps' the largest stay."""

    def __init__(self, folder: Path, name: str) -> None:
        graph = onnxfile.load(folder / f"{name}.onnx")
        self.peaks = {tensor.name: 0.0 for tensor in tap(graph)}
        files = onnxfile.save(graph, folder / f"{name}.tapped.onnx")
        self._engine: Engine = backends.backend(BACKEND).open([folder / file for file in files], Options())

    @property
    def io(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        inputs, outputs = self._engine.io
        return inputs, tuple(name for name in outputs if not name.endswith(TAP))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._engine.run(inputs)
        for name, peak in self.peaks.items():
            self.peaks[name] = float(np.maximum(peak, outputs.pop(name + TAP)))
        return outputs

    def close(self) -> None:
        self._engine.close()


def tap(graph: gs.Graph) -> list[gs.Variable]:
    """Adds an output for each tensor that a typed graph would hold in its narrow type."""
    tensors = watched(graph)
    for tensor in reversed(tensors):  # ONNX Runtime runs first what stands last, so no tensor waits for its tap
        magnitude = layer(graph, "Abs", [tensor], f"{tensor.name}/magnitude")
        peak = layer(graph, "ReduceMax", [magnitude], tensor.name + TAP, keepdims=0)
        peak.dtype, peak.shape = np.dtype(np.float32), []
        graph.outputs.append(peak)
    return tensors
