"""Hand-made bundles that are open, or to be damaged; servers, and a batcher whose engine waits for the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dit_runtime import Pipeline
from dit_runtime.serve import Batcher
from dit_serve.app import Settings
from tests.runtime.conftest import bundle, copied, opened
from tests.serve.serving import Running, running
from tests.serve.watched import Serve, Watched

__all__ = ["bundle", "copied", "opened"]


@pytest.fixture(scope="module")
def folder(handmade) -> Path:
    return handmade("labels")


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Running]:
    with running(folder) as started:
        yield started


@pytest.fixture
def held(folder) -> Iterator[tuple[Running, Watched]]:
    """A server whose step stage waits for the test."""
    with running(folder, places=4, settings=Settings(grace=5, deadline=30)) as started:
        pipe = started.model.batcher.pipe
        watched = Watched(pipe.engines.opened["denoiser"], RuntimeError("secret of the engine"))
        pipe.engines._opened["denoiser"] = watched
        watched.hold()
        yield started, watched
        watched.gate.release(10**6)


@pytest.fixture
def serve(opened, bundle) -> Iterator[Serve]:
    """Serves the hand-made bundle through a watched engine."""
    batchers: list[Batcher] = []

    def start(places: int | None = 3, error: Exception | None = None, **options: Any) -> tuple[Batcher, Watched]:
        pipe = Pipeline.load(bundle, threads=1)
        watched = Watched(pipe.engines.opened["denoiser"], error)
        pipe.engines._opened["denoiser"] = watched
        batchers.append(Batcher(pipe, places=places, **options))
        watched.calls.clear()
        while watched.entered.acquire(blocking=False):
            pass
        return batchers[-1], watched

    yield start
    for batcher in batchers:
        if batcher.alive:
            batcher.close(drain=False)
