"""Share what a fixture makes between the worker processes of one run."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def once(fixture: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    """Run a fixture in the first process that needs it; the other processes of the run read its pickled result.

    The fixture takes `tmp_path_factory` and returns paths (or what holds them), which tests must not change.
    """

    @functools.wraps(fixture)
    def shared(**fixtures: Any) -> Iterator[Any]:
        name = f"{fixture.__module__}.{fixture.__qualname__}"
        result = made_once(fixtures["tmp_path_factory"], name, lambda: fixture(**fixtures))
        folders = [path for path in (result if isinstance(result, tuple) else [result]) if isinstance(path, Path)]
        before = [listed(folder) for folder in folders]
        yield result
        assert before == [listed(folder) for folder in folders], f"a test changed what {name} shares; change a copy"

    shared.is_shared = True  # type: ignore[attr-defined]
    return shared


def is_shared(item: pytest.Item) -> bool:
    """Return whether a test uses such a fixture."""
    definitions = item._fixtureinfo.name2fixturedefs.values() if isinstance(item, pytest.Function) else ()
    return any(hasattr(last.func, "is_shared") for *_, last in definitions)


def made_once(tmp_path_factory: pytest.TempPathFactory, key: str, make: Callable[[], Any]) -> Any:
    """Return what `make` returned to the first process of this run that asked for `key`."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # a worker's own folder stands in that of the run
    result = folder / f"once-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pickle"
    with result.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.is_file():
            result.write_bytes(pickle.dumps(make()))
    return pickle.loads(result.read_bytes())


def listed(path: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of a file, or of all that a folder holds."""
    return [(str(file), file.lstat().st_size, file.lstat().st_mtime_ns) for file in sorted([path, *path.rglob("*")])]
