"""The choice of the samples in a call of the step stage, from its measured time at each batch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.engines import Engines
from dit_runtime.facts import CONSTANTS
from dit_runtime.pipeline import Pipeline
from dit_runtime.warming import made_up

TOLERANCE: float = CONSTANTS["batch_tolerance"]  # time a sample above the least: a larger batch must gain more
REPEATS, SECONDS = 5, 1.0  # of a batch size: the least of so many calls, or of those that fit


def measure(engines: Engines, clock: Callable[[], float] = time.perf_counter) -> dict[int, float]:
    """Return the seconds of a call of the step stage by its samples, guided where the stage mixes guidance.

    Sizes double up to the stage's largest. They end where three sizes in a row have gained nothing, so that a network
    whose curve is flat is not measured at its slowest sizes.
    """
    contract = engines.manifest
    times = np.array([contract.process.train_steps / 2])
    curve: dict[int, float] = {}
    for size in sizes(contract.step.max_batch):
        condition = made_up(contract, size)
        if port := contract.guidance.port:
            condition[port] = np.full((size, *contract.port(port).shape), contract.guidance.default, np.float32)
        negative = {name: rows[:1] for name, rows in condition.items()} if contract.mixes_guidance else None
        encoded = engines.encode(condition), negative and engines.encode(negative)
        inputs = engines.inputs(times, *encoded, np.full(size, contract.guidance.default, np.float32))
        state = np.zeros((size, *contract.state.shape), np.float32)
        engines.denoise(state, inputs, 0)  # what is compiled or filled once
        spent: list[float] = []
        while len(spent) < REPEATS and (not spent or sum(spent) < SECONDS):
            began = clock()
            engines.denoise(state, inputs, 0)
            spent.append(clock() - began)
        curve[size] = min(spent)
        if len(curve) > 2 and knee(curve) <= size // 4:
            break
    return curve


def sizes(largest: int) -> list[int]:
    """Return 1, 2, 4, … and the largest."""
    return sorted({2**power for power in range(largest.bit_length())} | {largest})


def knee(curve: Mapping[int, float]) -> int:
    """Return the smallest batch size whose time a sample is within TOLERANCE of the least; 1 on a flat curve."""
    least = min(seconds / size for size, seconds in curve.items())
    return min(size for size, seconds in curve.items() if seconds / size <= (1 + TOLERANCE) * least)


class Sized:
    """One of a bundle's sizes: its pipeline, and how many of its samples share a call."""

    def __init__(self, pipe: Pipeline, curve: Mapping[int, float], places: int | None) -> None:
        self.pipe, self.curve, self.weight = pipe, curve, 1.0
        self.places = places or (knee(curve) if pipe.manifest.batch_invariant else 1)
        nearest = max(size for size in curve if size <= self.places)
        groups = 2 if pipe.manifest.mixes_guidance else 1
        self.row = curve[nearest] / nearest / groups  # seconds

    def call(self, inputs: Mapping[str, NDArray[Any]], count: int) -> Mapping[str, NDArray[Any]]:
        """Run the step stage on so many samples, in parts where one request has more than it takes."""
        stage, parts = self.pipe.manifest.step, []
        grouped = {spec.name for spec in stage.grouped}
        for first in range(0, count, stage.max_batch):
            some = slice(first, first + stage.max_batch)
            part = {name: values[:, some] if name in grouped else values[some] for name, values in inputs.items()}
            parts.append(self.pipe.engines.run(stage, part))
        return parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
