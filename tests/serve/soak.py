"""A server under a light, mixed load: its memory and its descriptors stay. `python -m tests.serve.soak SECONDS`.

`make test` runs it beside all other tests, on a hand-made bundle, for it waits more than it works.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.handmade import module
from tests.serve import load
from tests.serve.serving import descriptors, process, resident, until

GROWTH = 50e6  # bytes


def soak(folder: Path, seconds: float, rate: float, classes: int, *options: str) -> None:
    """Offer so many requests a second; a fifth of the clients leave. Memory is compared with that after a warm-up."""
    with process(f"demo={folder}", "--deadline", "5", "--skip-verify", *options) as (started, client, _):
        pid = started.pid
        asyncio.run(load.closed(client.port, 8, min(20, seconds / 6), classes=classes))
        time.sleep(1)
        before = resident(pid), descriptors(pid)
        outcomes = asyncio.run(load.opened(client.port, rate, seconds, leaving=0.2, classes=classes))
        until(lambda: descriptors(pid) <= before[1] + 2)  # connections of the last clients end
        after = resident(pid), descriptors(pid)
    print(load.describe(f"soak, {seconds:.0f} s", outcomes, seconds))
    print(f"memory {before[0] / 1e6:.0f} -> {after[0] / 1e6:.0f} MB, descriptors {before[1]} -> {after[1]}", flush=True)
    statuses = {outcome.status for outcome in outcomes}
    assert 200 in statuses and statuses <= {0, 200, 429, 504}
    assert after[0] - before[0] <= GROWTH


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as place:
        bundle = Path(place) / "bundle"
        module("make_bundle").make(bundle, "labels")
        soak(bundle, float(sys.argv[1]), 5, 5, "--batch", "3", "--allow-batch-variance")
