"""Measure what batching saves and what the batcher takes, in processor time: `python -m tests.serve.cost BUNDLE`.

Engines have one thread. Other work on the machine does not count in processor time, though its caches do.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime import Pipeline, Request
from dit_runtime.serve import Batcher

COUNT = 32


class Free:
    """An engine whose answers are there at once: zeros of the right shapes."""

    def __init__(self, pipe: Pipeline, stage: Any) -> None:
        self._stage, self.io = stage, pipe.engines.opened[stage.name].io
        self.close = pipe.engines.opened[stage.name].close

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        rows = self._stage.rows(inputs)
        return {spec.name: np.zeros((rows, *spec.shape[1:]), np.float32) for spec in self._stage.gives}


class Timed(Batcher):
    """A batcher that adds up the processor time of its steps, those of its thread alone."""

    stepping = 0.0

    def _step(self, tickets: Any) -> None:
        began = time.thread_time()
        super()._step(tickets)
        self.stepping += time.thread_time() - began


def requests() -> list[Request]:
    choose = random.Random(0)
    return [
        Request(number % 20, steps=choose.choice([10, 25, 50]), guidance=choose.choice([2.0, 4.0, 6.0]), seed=number)
        for number in range(COUNT)
    ]


def draw(folder: Path, places: int, free: bool) -> None:
    pipe = Pipeline.load(folder, threads=1)
    pipe.engines.opened  # noqa: B018 - it waits for what opens in the background
    batcher = Timed(pipe, places=places)
    batcher.submit(Request(0, steps=2)).result()
    if free:
        for stage in (pipe.manifest.step, pipe.manifest.require_end()):
            pipe.engines._opened[stage.name] = Free(pipe, stage)
        [ticket.result() for ticket in [batcher.submit(request) for request in requests()]]  # fills the memo
    before, began, batcher.stepping = batcher.counts["samples"], time.process_time(), 0.0
    tickets = [batcher.submit(request) for request in requests()]
    for ticket in tickets:
        ticket.result()
    spent, samples = time.process_time() - began, batcher.counts["samples"] - before
    what = "without engines" if free else "with engines"
    what = f"{1e6 * batcher.stepping / samples:.0f} µs of a sample and step are Python's" if free else "with engines"
    print(f"{folder.name}, {places} places: {1e3 * spent / COUNT:.1f} ms a picture, {what}", flush=True)
    batcher.close()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for free in (False, True):
            for places in (1, 8):
                draw(Path(name), places, free)
