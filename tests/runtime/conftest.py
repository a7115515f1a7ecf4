"""Hand-made bundles that are open, or to be damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dit_runtime import Pipeline


@pytest.fixture
def copied(handmade, tmp_path) -> Callable[[str], Path]:
    """A copy of such a bundle, to be damaged."""

    def copy(kind: str = "labels") -> Path:
        return Path(shutil.copytree(handmade(kind), tmp_path / "bundle"))

    return copy


@pytest.fixture
def bundle(copied) -> Path:
    """A copy of the bundle that takes labels."""
    return copied("labels")


@pytest.fixture
def opened(handmade):
    """Opens a kind's bundle on one thread; all are closed at the end."""
    pipes: list[Pipeline] = []

    def open_(kind: str = "labels", **options: object) -> Pipeline:
        pipes.append(Pipeline.load(handmade(kind), threads=1, **options))
        return pipes[-1]

    yield open_
    for pipe in pipes:
        pipe.close()


@pytest.fixture
def pipe(opened) -> Pipeline:
    """The open bundle that takes labels."""
    return opened("labels")
