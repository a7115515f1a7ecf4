"""Load that stops by itself: overload, clients that leave, are silent or do not read, and a soak.

The default run looks at outcomes alone; `pytest -s -m slow tests/serve/test_load.py` also measures, and prints.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dit_serve.app import Settings
from tests.serve import load
from tests.serve.serving import Running, process, resident, running, until
from tests.serve.soak import soak
from tests.serve.watched import Watched


class Slow:
    """An engine whose calls take 2 ms at least: 18 images of 28 steps a second at most, on any machine."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.io, self.close = engine, engine.io, engine.close

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.002)
        return self.engine.run(inputs)


def test_overload_is_answered(handmade) -> None:
    """Every request is drawn, refused with Retry-After, or late; nothing stays behind."""
    with running(handmade("labels"), Settings(grace=5, deadline=1.0)) as server:
        engines = server.model.batcher.pipe.engines
        engines._opened["denoiser"] = Slow(engines.opened["denoiser"])
        outcomes = asyncio.run(load.opened(server.port, 150, 1.5))
        assert len(outcomes) > 150
        statuses = {outcome.status for outcome in outcomes}
        assert {200, 429} <= statuses <= {200, 429, 504}
        assert all(outcome.retry_after == (outcome.status == 429) for outcome in outcomes)
        batcher = server.model.batcher
        assert batcher.active == batcher.queued == 0
        counts = batcher.counts
        assert counts["drawn"] == sum(outcome.status == 200 for outcome in outcomes)
        assert counts["refused"] == sum(outcome.status == 429 for outcome in outcomes)
        assert counts["late"] == sum(outcome.status == 504 for outcome in outcomes) and not counts["failed"]


def test_clients_that_leave_leave_nothing(held: tuple[Running, Watched]) -> None:
    server, watched = held
    timer = threading.Timer(1.2, watched.gate.release, [10**6])  # however fast it is
    timer.start()
    outcomes = asyncio.run(load.opened(server.port, 60, 1, leaving=0.8))
    timer.join()
    statuses = {outcome.status for outcome in outcomes}
    assert {0, 200} <= statuses <= {0, 200, 429}  # 429: one that came after the wait, which counts as work
    batcher = server.model.batcher
    until(lambda: batcher.active == batcher.queued == 0)
    assert batcher.counts["cancelled"] > 10 and batcher.alive
    assert server.draw(num_inference_steps=2).status == 200


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    from dit_export.cli import main
    from dit_export.demo import store

    folder = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["build", "--checkpoint", str(store.MODEL), "--backend", "openvino", "-o", str(folder)]) == 0
    return folder


@pytest.fixture
def served(demo) -> Iterator[tuple[int, Running]]:
    with process(f"demo={demo}", "--deadline", "5", "--batch", "8", "--skip-verify") as (started, client, _):
        yield started.pid, client


@pytest.mark.slow
def test_ten_times_what_it_can_do(served: tuple[int, Running]) -> None:
    pid, client = served
    closed = asyncio.run(load.closed(client.port, 8, 15, classes=20))
    capacity = sum(outcome.status == 200 for outcome in closed) / 15
    print(load.describe("closed, 8 clients", closed, 15))
    before, began = resident(pid), time.monotonic()
    outcomes = asyncio.run(load.opened(client.port, 10 * capacity, 60, classes=20))
    seconds = time.monotonic() - began
    print(load.describe("open, 10 x capacity", outcomes, seconds))
    good = sum(outcome.status == 200 and outcome.seconds <= 5 for outcome in outcomes)
    late = sum(outcome.status == 504 or outcome.seconds > 5 for outcome in outcomes if outcome.status != 429)
    print(f"goodput {good / seconds:.1f}/s, late {late}, memory +{(resident(pid) - before) / 1e6:.0f} MB")
    assert {outcome.status for outcome in outcomes} <= {200, 429, 504}
    assert good / seconds >= 0.9 * capacity
    assert late <= 0.02 * (good + late)
    assert load.percentiles(outcomes, 429)[2] <= 50
    assert resident(pid) - before <= 50e6


@pytest.mark.slow
def test_leaving_silent_and_unread_clients(served: tuple[int, Running]) -> None:
    _, client = served

    async def measure() -> tuple[list[load.Outcome], list[load.Outcome]]:
        before = await load.closed(client.port, 2, 10, classes=20, steps=(10,))
        writers = [*await load.idle(client.port, 10, reading=True), *await load.idle(client.port, 10, reading=False)]
        during = await load.closed(client.port, 2, 10, classes=20, steps=(10,))
        for writer in writers:
            writer.close()
        return before, during

    before, during = asyncio.run(measure())
    print(load.describe("alone", before, 10))
    print(load.describe("beside 20 idle clients", during, 10))
    assert load.percentiles(during, 200)[0] <= load.percentiles(before, 200)[0] + 50

    asyncio.run(load.opened(client.port, 100, 2, leaving=1.0, classes=20))
    began = time.monotonic()
    until(lambda: b'dit_active_images{model="demo"} 0.0' in client.ask("GET", "/metrics").body)
    print(f"no row active {time.monotonic() - began:.2f} s after 200 clients that left")
    assert time.monotonic() - began <= 1


@pytest.mark.slow
def test_soak(demo: Path) -> None:
    """For SOAK_SECONDS, by default half an hour."""
    soak(demo, float(os.environ.get("SOAK_SECONDS", "1800")), 10, 20, "--batch", "8", "--skip-verify")
