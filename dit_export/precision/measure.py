"""Measure in one run of the fp32 bundle what int8 and half precision must fit.

The sampler itself runs: solver, guidance, conditional and null rows, the whole schedule. Taps on the denoiser and the
decoder record statistics, so no activation is stored. Each layer's input leaves its largest magnitude a channel
and a few rows; each tensor that half precision would store leaves its largest magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from dit_export.graph import onnxfile
from dit_export.networks import Network, fixtures
from dit_export.networks.text import PromptEncoder
from dit_export.passes import LOWERINGS
from dit_export.passes.attention import scores_of
from dit_export.precision.calibrate import (
    LARGEST,
    LOWEST,
    OUTPUT,
    SAMPLE,
    Calibration,
    LayerStatistics,
    add_layer_taps,
    choose_rows,
    collect,
)
from dit_export.precision.convolutions import add_convolution_taps
from dit_export.precision.convolutions import find as find_convolutions
from dit_export.precision.half import PEAK, add_peak_taps, half_tensors
from dit_export.precision.layers import find
from dit_export.precision.prompts import Prompts, batches
from dit_runtime import backends, images
from dit_runtime.backends import PORTABLE_BACKEND, Engine, Options
from dit_runtime.bundle import manifest
from dit_runtime.pipeline import Pipeline

TAPS = (LARGEST, LOWEST, SAMPLE, OUTPUT, PEAK)
ROWS = 256  # inputs stored for each layer: 115 MB for XL/2, as float16


@dataclass(frozen=True)
class Plan:
    """Many pictures of few steps: ranges differ more between pictures than between neighbouring steps."""

    pictures: int = 24
    steps: int = 6
    seed: int = 1000  # not one of the reference's
    batch: int = 4


PEAKS_PLAN = Plan(pictures=4, steps=10)  # where only the largest magnitudes are wanted


@dataclass(frozen=True)
class Measured:
    calibration: Calibration | None = None
    peaks: dict[str, Mapping[str, float]] = field(default_factory=dict)  # by stage and tensor


def measure(
    folder: Path,
    graphs: Mapping[str, gs.Graph],
    network: Network,
    plan: Plan,
    own: Prompts | None,
    layers: bool,
    half: bool,
    on_step: Callable[[int, int], None],
    convolutions: bool = False,
) -> Measured:
    """Run the fp32 bundle in `folder` once, with taps on its `graphs`, and return what they recorded.

    `layers` asks for statistics of the denoiser's layers, `convolutions` for those of the decoder's convolutions, and
    `half` for the largest magnitudes of all graphs. `own` holds a user's prompts.
    """
    contract, rng = manifest.read(folder), np.random.default_rng(plan.seed)
    stages = [contract.step] + ([contract.end] if (half or convolutions) and contract.end else [])
    stages += [contract.start] if half and contract.start else []
    total = -(-plan.pictures // plan.batch) * plan.steps
    done = 0

    def tick(*_: object) -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    with ExitStack() as stack:
        recorders: dict[str, RecordingEngine] = {}
        for stage in [*contract.before_loop, *stages]:
            graph = graphs[stage.name].copy()  # a file has no shapes of what is in between
            is_step, tapped = stage is contract.step, stage in stages
            add_taps(
                graph, layers and is_step, half and tapped, rng, convolutions=convolutions and stage is contract.end
            )
            calls = total if is_step else -(-(plan.pictures + plan.batch) // stage.max_batch)
            engine = RecordingEngine(graph, folder / f"{stage.name}.tapped.onnx", max(1, ROWS // calls), rng)
            recorders[stage.name] = engine
        pipe = stack.enter_context(Pipeline(folder, contract, recorders))
        for index, prompts in enumerate(batches(network, own, plan.pictures, plan.batch)):
            first = index * plan.batch
            seed, seeds = plan.seed + first, range(first, min(first + plan.batch, plan.pictures))
            drawn = pipe.sample(
                condition=prompts.condition,
                negative=prompts.negative if network.mixes_guidance else None,
                steps=plan.steps,
                seed=seed if prompts.condition else [plan.seed + picture for picture in seeds],
                output="images" if contract.end in stages and (convolutions or index == 0) else "latents",
                on_step=tick,
            )
            if contract.start in stages and index == 0:
                noise = rng.integers(0, 256, drawn.shape, np.uint8)
                pipe.engines.encode_pictures(images.to_unit(np.concatenate([drawn, noise])))
        if convolutions and contract.end:  # its gate decodes noise
            pipe.engines.decode(rng.normal(size=(plan.batch, *contract.state.shape)))
    calibration = None
    if layers:
        statistics = {name: layer for recorder in recorders.values() for name, layer in recorder.statistics().items()}
        calibration = Calibration(statistics, {"plan": str(plan)})
    return Measured(calibration, {stage.name: recorders[stage.name].peaks() for stage in stages} if half else {})


def measure_prompts(graph: gs.Graph, folder: Path, text: PromptEncoder) -> dict[str, float]:
    """Return the largest magnitude of what half precision would store in the text encoders, by tensor."""
    rng = np.random.default_rng(PEAKS_PLAN.seed)
    add_taps(graph, layers=False, half=True, rng=rng)
    recorder = RecordingEngine(graph, folder / "prompt.tapped.onnx", 1, rng, Options(streamed=True))
    try:
        for rows in (fixtures.tokenize(text, [*fixtures.TEXTS, fixtures.LONG]), fixtures.token_ids(text)):
            recorder.run(rows)
    finally:
        recorder.close()
    return recorder.peaks()


def add_taps(graph: gs.Graph, layers: bool, half: bool, rng: np.random.Generator, convolutions: bool = False) -> None:
    """Give a fused graph the form that the backend runs, and taps on what is looked up in the portable one."""
    gemms = find(graph) if layers else []
    kernels = find_convolutions(graph) if convolutions else []
    tensors = half_tensors(graph) if half else []
    scores = {scores_of(node.outputs[0]) for node in graph.nodes if half and node.op == "Attention"}
    for rewrite in LOWERINGS[PORTABLE_BACKEND]:
        rewrite(graph)
    tensors += [tensor for name, tensor in graph.tensors().items() if name in scores]  # the plain form stores them
    count = len(graph.nodes)
    place = {id(tensor): index for index, node in enumerate(graph.nodes) for tensor in node.outputs}
    add_layer_taps(graph, gemms, rng)
    add_convolution_taps(graph, kernels, rng)
    add_peak_taps(graph, tensors)

    def tapped(node: gs.Node) -> int:
        tensor = node.inputs[0]
        while id(tensor) not in place and tensor.inputs:
            tensor = tensor.inputs[0].inputs[0]
        return place.get(id(tensor), -1)

    # ONNX Runtime runs first what stands last, so that no tensor waits for its tap.
    graph.nodes[count:] = sorted(graph.nodes[count:], key=tapped, reverse=True)


class RecordingEngine:
    """An engine of a graph with taps, whose file is gone once it is open.

    The graph's own outputs pass through. The taps leave a bounded share of each call.
    """

    def __init__(
        self,
        graph: gs.Graph,
        path: Path,
        rows_a_call: int,
        rng: np.random.Generator,
        options: Options | None = None,
    ) -> None:
        with onnxfile.temporary(graph, path) as files:
            self._engine: Engine = backends.backend(PORTABLE_BACKEND).open(files, options or Options())
        self._rows, self._rng = rows_a_call, rng
        self._largest: dict[str, NDArray[np.float32]] = {}  # by the taps' whole names
        self._samples: dict[str, list[NDArray[np.float16]]] = {}

    @property
    def io(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        inputs, outputs = self._engine.io
        return inputs, tuple(name for name in outputs if not name.endswith(TAPS))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._engine.run(inputs)
        for name in [name for name in outputs if name.endswith(TAPS)]:
            values = outputs.pop(name)
            if name.endswith(SAMPLE):
                self._samples.setdefault(name, []).append(choose_rows(values, self._rows, self._rng))
            else:
                furthest = np.minimum if name.endswith(LOWEST) else np.maximum
                self._largest[name] = furthest(self._largest.get(name, values), values)
        return outputs

    def statistics(self) -> dict[str, LayerStatistics]:
        return collect(self._largest, self._samples)

    def peaks(self) -> dict[str, float]:
        return {name.removesuffix(PEAK): float(value) for name, value in self._largest.items() if name.endswith(PEAK)}

    def close(self) -> None:
        self._engine.close()
