"""The C++ library as `make cpp` builds it, or in the folder that DIT_CPP_BUILD names."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.handmade import module
from tests.once import once
from tests.serve.serving import process

BUILD = Path(os.environ.get("DIT_CPP_BUILD", Path(__file__).parents[2] / "build/cpp"))


@pytest.fixture(scope="session")
def build() -> Path:
    assert (BUILD / "programs/dit-generate").is_file(), f"no C++ library in {BUILD}; run: make cpp"
    return BUILD


@pytest.fixture(scope="session")
@once
def tiny(tmp_path_factory) -> Path:
    """The bundle of the C++ tests: 5 classes, 32 px, no time to draw."""
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    module("make_bundle").make(folder)
    return folder


@pytest.fixture(scope="session")
def start(build: Path) -> Callable[..., AbstractContextManager[Any]]:
    """Runs `dit-server`: `tests.serve.serving.process`."""
    return partial(process, program=[str(build / "programs/dit-server")])


@pytest.fixture
def dit_generate(build, tmp_path_factory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the program."""

    cache = tmp_path_factory.getbasetemp() / "cache"  # of what engines compile
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}

    def run(*arguments: object, threads: int = 1) -> subprocess.CompletedProcess[str]:
        command = [str(build / "programs/dit-generate"), *map(str, arguments), "--threads", str(threads)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    return run
