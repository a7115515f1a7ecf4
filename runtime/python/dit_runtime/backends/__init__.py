"""One file a backend, imported only when it is asked for.

A backend's module has `version()` (None where it is not installed), `compile(onnx, folder, options)`, which makes
engine files of an ONNX graph, and `open(files, options)`, which gives an Engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Protocol

import numpy as np

from dit_runtime.errors import UsageError, nearest

BACKENDS = {"onnxruntime": "ort"}  # name -> module; `auto` takes the first that is installed


@dataclass(frozen=True)
class Options:
    threads: int | None = None  # None: as many as the backend thinks right
    provider: str | None = None  # ONNX Runtime's execution provider, "cuda" for CUDAExecutionProvider


class Engine(Protocol):
    """A network, ready to run; arrays go in and come out by name."""

    @property
    def io(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of inputs and of outputs."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


def backend(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is not known{nearest(name, BACKENDS)}; known: {', '.join(BACKENDS)}")
    return import_module(f"{__name__}.{BACKENDS[name]}")


def versions() -> dict[str, str | None]:
    """Each backend's version, None where it is not installed."""
    return {name: backend(name).version() for name in BACKENDS}


def choose(name: str) -> str:
    """`auto` is the first backend that is installed; any other name is itself, where it is installed."""
    found = versions()
    if name == "auto":
        name = next((known for known, version in found.items() if version), "")
        if not name:
            raise UsageError("no backend is installed: pip install 'dit-export[onnxruntime]'")
    elif backend(name) and found[name] is None:
        raise UsageError(f"backend {name!r} is not installed: pip install 'dit-export[{name}]'")
    return name
