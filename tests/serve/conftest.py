"""Hand-made bundles that are open, or to be damaged, and a server whose engine waits for the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_serve.app import Settings
from tests.runtime.conftest import bundle, copied, opened
from tests.serve.serving import Running, running
from tests.serve.test_batcher import Watched

__all__ = ["bundle", "copied", "opened"]


@pytest.fixture(scope="module")
def folder(handmade) -> Path:
    return handmade("labels")


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
