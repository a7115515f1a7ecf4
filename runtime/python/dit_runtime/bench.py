"""Times a bundle's graphs and a whole picture, interleaved, as medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from dit_runtime.bundle.manifest import Graph
from dit_runtime.errors import UsageError
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.sampling.noise import Noise


class Timing(NamedTuple):
    name: str
    median_ms: float
    least_ms: float
    most_ms: float
    rounds: int


class _Instant:
    """An engine that answers zeros at once, so that what a run takes is the loop's own cost."""

    def __init__(self, graph: Graph) -> None:
        self.io = tuple(spec.name for spec in graph.inputs), tuple(spec.name for spec in graph.outputs)
        self._shapes = {spec.name: [int(size) for size in spec.shape[1:]] for spec in graph.outputs}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = len(next(iter(inputs.values())))
        return {name: np.zeros((rows, *shape), np.float32) for name, shape in self._shapes.items()}

    def close(self) -> None:
        pass


def measure(pipe: Pipeline, batch: int, steps: int, rounds: int, progress: Progress) -> list[Timing]:
    largest = pipe.manifest.graphs["denoiser"].max_batch
    if not 1 <= batch <= largest or rounds < 1:
        raise UsageError(f"batch {batch}, rounds {rounds}; expected a batch of 1 to {largest} and at least one round")
    latents = Noise(0).normal((batch, *pipe.manifest.latent_shape))
    timesteps, weights = np.full(batch, pipe.manifest.diffusion.span / 2, np.float32), np.full(batch, 4.0, np.float32)
    ids = np.arange(batch) % pipe.manifest.num_classes
    numbers = [int(number) for number in ids]
    rows, weights = pipe.table(timesteps[:1], numbers, guided=True)(0, slice(None)), pipe._put(weights)
    context, own = (pipe.examples(numbers, guided)(slice(None)) for guided in (True, False))
    engines = {name: _Instant(graph) for name, graph in pipe.manifest.graphs.items()}
    alone = Pipeline(pipe.folder, pipe.manifest, engines)
    whole = "images" if "decoder" in pipe.manifest.graphs else "latents"
    tasks: dict[str, Callable[[], object]] = {
        "conditioner, a pair": lambda: pipe.condition(timesteps[:1], ids[:1]),
        "denoiser, a step without guidance": lambda: pipe.denoise(latents, rows[:1], weights, own),
        "denoiser, a guided step": lambda: pipe.denoise(latents, rows, weights, context),
        f"{whole}, {steps} guided steps": lambda: pipe.sample(numbers, steps=steps, output=whole),
        f"the host's loop itself, {steps} guided steps": lambda: alone.sample(numbers, steps=steps, output="latents"),
    }
    if whole == "images":
        tasks["decoder"] = lambda: pipe.decode(latents)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for index in range(rounds + 1):  # the first round warms up and is not counted
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
        progress.step(index, rounds, "bench")
    progress.end()
    milliseconds = {name: [1e3 * second for second in times[1:]] for name, times in seconds.items()}
    return [
        Timing(name, statistics.median(times), min(times), max(times), rounds) for name, times in milliseconds.items()
    ]


def table(rows: list[Timing]) -> str:
    lines = [f"{'':<36} {'median':>10} {'least':>10} {'most':>10}  ms"]
    lines += [f"{row.name:<36} {row.median_ms:>10.1f} {row.least_ms:>10.1f} {row.most_ms:>10.1f}" for row in rows]
    return "\n".join(lines)
