"""Hand-made bundles, of which the runtime's tests need no toolchain: make_bundle.py says what each kind holds."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dit_runtime import Pipeline


@pytest.fixture(scope="session")
def handmade(tmp_path_factory) -> Callable[[str], Path]:
    """The bundle of a kind: labels, captioned, wave, video or free; each is made once."""
    from tests.handmade import module

    folder = tmp_path_factory.mktemp("handmade")

    @functools.cache
    def bundle(kind: str) -> Path:
        module("make_bundle").make(folder / kind, kind)
        return folder / kind

    return bundle


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
