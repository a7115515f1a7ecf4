"""An engine whose calls wait for the test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from dit_runtime.serve import Batcher
from tests.serve.serving import WAIT

POISON = 6.5  # the weight of guidance of the request that an engine below fails for


class Watched:
    """The engine of a stage; each call waits until it may go on, and fails where a sample's guidance is POISON."""

    def __init__(self, engine: Any, error: Exception | None = None) -> None:
        self.engine, self.io, self.close, self.error = engine, engine.io, engine.close, error
        self.calls: list[tuple[int, int]] = []  # groups, samples
        self.gate = threading.Semaphore(10**6)
        self.entered = threading.Semaphore(0)

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.entered.release()
        assert self.gate.acquire(timeout=WAIT)
        self.calls.append(inputs["conditioning"].shape[:2])
        poisoned = inputs["guidance"] == np.float32(POISON)
        if poisoned.any() and self.error is not None:
            raise self.error
        # Each sample alone: the sums of hand-made graphs depend on the batch, and bits are compared here.
        rows = [
            self.engine.run({name: a[:, [i]] if name == "conditioning" else a[[i]] for name, a in inputs.items()})
            for i in range(len(poisoned))
        ]
        outputs = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        outputs["prediction"][poisoned] = np.nan
        return outputs

    def hold(self) -> None:
        """Let no further call through."""
        while self.gate.acquire(blocking=False):
            pass


Serve = Callable[..., tuple[Batcher, Watched]]
