"""A server under a light, mixed load: its memory and descriptors stay, and a picture has the bits that it has alone.

`python -m tests.serve.soak SECONDS [--bundle FOLDER --classes N --rate X] [--program build/cpp/programs/dit-server]`.
`make test` runs it beside all other tests, on a hand-made bundle, for it waits more than it works.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.handmade import module
from tests.serve import load
from tests.serve.serving import SERVE, Running, descriptors, process, resident, until

GROWTH = 50e6  # bytes
SEEDS = 4  # so few that each picture is drawn often


def soak(
    folder: Path, seconds: float, rate: float, classes: int, *options: str, program: Sequence[str] = SERVE
) -> None:
    """Offer so many requests a second; a fifth of the clients leave. Memory is compared with that after a warm-up."""
    asked = {"classes": classes, "seeds": SEEDS}
    with process(f"demo={folder}", "--deadline", "5", *options, program=program) as (started, client, _):
        pid = started.pid
        asyncio.run(load.closed(client.port, 8, min(20, seconds / 6), **asked))
        time.sleep(1)
        before = resident(pid), descriptors(pid)
        outcomes = asyncio.run(load.opened(client.port, rate, seconds, leaving=0.2, **asked))
        until(lambda: descriptors(pid) <= before[1] + 2)  # connections of the last clients end
        after = resident(pid), descriptors(pid)
        pictures = defaultdict(set)
        for outcome in outcomes:
            if outcome.status == 200:
                pictures[outcome.body].add(outcome.picture)
        wrong = [body for body, drawn in pictures.items() if drawn != {alone(client, body)}]
    print(load.describe(f"soak, {seconds:.0f} s", outcomes, seconds))
    print(f"memory {before[0] / 1e6:.0f} -> {after[0] / 1e6:.0f} MB, descriptors {before[1]} -> {after[1]}")
    print(f"{len(pictures)} different pictures, of which {len(wrong)} did not always have the same bits", flush=True)
    statuses = {outcome.status for outcome in outcomes}
    assert 200 in statuses and statuses <= {0, 200, 429, 504}
    assert after[0] - before[0] <= GROWTH
    assert not wrong


def alone(client: Running, body: str) -> str:
    """Return the picture's digest from a call that no other request shares; a busy machine may refuse it at first."""
    for _ in range(20):
        outcome = asyncio.run(load.ask(client.port, json.loads(body)))
        if outcome.status == 200:
            return outcome.picture
        time.sleep(0.5)
    raise AssertionError(f"a request alone ends with {outcome.status}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--bundle", type=Path, help="by default a hand-made one")
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--rate", type=float, default=5, help="requests a second")
    parser.add_argument("--program", help="by default dit-serve")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "bundle"
        shared = ["--batch", "8"]
        if chosen.bundle is None:
            module("make_bundle").make(made, "labels")
            shared = ["--batch", "3", "--allow-batch-variance", "--skip-verify"]
        program = [chosen.program] if chosen.program else SERVE
        soak(chosen.bundle or made, chosen.seconds, chosen.rate, chosen.classes, *shared, program=program)
