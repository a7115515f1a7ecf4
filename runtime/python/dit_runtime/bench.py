"""Times a bundle's stages and a whole picture, interleaved, as medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dit_runtime.bundle.records import Stage
from dit_runtime.conditions.memo import open_sources
from dit_runtime.errors import UsageError
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.request import Request
from dit_runtime.sampling.noise import Noise
from dit_runtime.warming import made_up, warm


class Timing(NamedTuple):
    name: str
    median_ms: float
    least_ms: float
    most_ms: float
    rounds: int


class _Instant:
    """An engine that answers zeros at once, so that what a run takes is the loop's own cost."""

    def __init__(self, stage: Stage) -> None:
        self.io = tuple(spec.name for spec in stage.reads), tuple(spec.name for spec in stage.gives)
        self._stage = stage
        self._gives = {
            spec.name: ([int(size) for size in spec.shape[1:]], np.dtype(spec.dtype)) for spec in stage.gives
        }

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = self._stage.rows(inputs)
        return {name: np.zeros((rows, *shape), dtype) for name, (shape, dtype) in self._gives.items()}

    def close(self) -> None:
        pass


def measure(
    pipe: Pipeline, batch: int, steps: int | None, rounds: int, progress: Progress, preset: str | None = None
) -> list[Timing]:
    contract = pipe.manifest
    largest = contract.step.max_batch
    if not 1 <= batch <= largest or rounds < 1:
        raise UsageError(f"batch {batch}, rounds {rounds}; expected a batch of 1 to {largest} and at least one round")
    state = Noise(0).normal((batch, *contract.state.shape))
    condition, output = made_up(contract, batch), "images" if contract.end else "latents"
    negative = {name: rows[:1] for name, rows in condition.items()} if contract.without_null else None
    asked: dict[str, Any] = {"steps": steps, "preset": preset, "seed": [*range(batch)], "output": output}
    request = Request(condition=condition, negative=negative, **asked)
    checked = request.check(contract)
    tasks: dict[str, Callable[[], object]] = {}
    if contract.prompt is not None:
        ids = {port.name: condition[port.name][:1] for port in contract.prompt_ports}
        tasks[f"{contract.prompt.name}, a row"] = partial(pipe.engines.run, contract.prompt, ids)
    condition, steps = pipe.engines.encode(checked.condition), checked.steps
    away = checked.negative and pipe.engines.encode(checked.negative)
    middle, weights = np.array([contract.process.span / 2]), checked.weights
    unguided = pipe.engines.inputs(middle, condition, None, weights)
    single = {name: rows[:1] for name, rows in condition.items()}
    sources = open_sources(contract, pipe.engines.run, middle, single, 1, whole=pipe.engines.options.low_memory)
    alone = Pipeline(pipe.folder, contract, {stage.name: _Instant(stage) for stage in contract.stages})
    numbers = np.zeros(1, np.int64)
    for stage in contract.before_loop:
        inputs = {spec.name: sources[spec.name].take(numbers, numbers) for spec in stage.reads}
        tasks[f"{stage.name}, a row"] = partial(pipe.engines.run, stage, inputs)
    tasks[f"{contract.step.name}, a step without guidance"] = lambda: pipe.engines.denoise(state, unguided, 0)
    kind = "steps"
    if away is not None:
        guided = pipe.engines.inputs(middle, condition, away, weights)
        tasks[f"{contract.step.name}, a guided step"] = lambda: pipe.engines.denoise(state, guided, 0)
        kind = "guided steps"
    picture = f"{output}, {steps} {kind}" + (f", preset {preset}" if preset else "")
    tasks[picture] = lambda: pipe.run(request).result()
    bare = replace(request, output="latents")
    tasks[f"the host's loop itself, {steps} {kind}"] = lambda: alone.run(bare).result()
    if contract.start is not None:
        shape = batch, *(int(size) for size in contract.start.reads[0].shape[1:])
        tasks[contract.start.name] = partial(pipe.engines.encode_pictures, np.full(shape, 0.5, np.float32))
    if contract.end is not None:
        tasks[contract.end.name] = lambda: pipe.engines.decode(state)
    if not pipe.engines.options.low_memory:
        warm(pipe.engines, [batch])
    start = time.perf_counter()
    tasks[picture]()
    first = 1e3 * (time.perf_counter() - start)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for index in range(rounds + 1):  # the first round warms up and is not counted
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
        progress.step(index, rounds, "bench")
    progress.end()
    milliseconds = {name: [1e3 * second for second in times[1:]] for name, times in seconds.items()}
    rows = [
        Timing(name, statistics.median(times), min(times), max(times), rounds) for name, times in milliseconds.items()
    ]
    return [Timing(f"the first {picture}", first, first, first, 1), *rows]


def table(rows: list[Timing]) -> str:
    lines = [f"{'':<44} {'median':>10} {'least':>10} {'most':>10}  ms"]
    lines += [f"{row.name:<44} {row.median_ms:>10.2f} {row.least_ms:>10.2f} {row.most_ms:>10.2f}" for row in rows]
    return "\n".join(lines)
