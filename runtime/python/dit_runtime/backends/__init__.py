"""One file a backend, imported only when it is asked for.

A backend's module has `PRECISIONS`, `version()` (None where it is not installed), `compile(onnx, folder, options)`,
which makes engine files of an ONNX graph, and `open(files, options)`, which gives an Engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from dit_runtime.errors import UsageError, nearest

BACKENDS = {"openvino": "ov", "onnxruntime": "ort"}  # name -> module; `auto` takes the first that is installed
LEANEST = "onnxruntime"  # while it loads: about the weights' size, where OpenVINO takes twice that


@dataclass(frozen=True)
class Options:
    threads: int | None = None  # None: as many as the backend thinks right
    provider: str | None = None  # ONNX Runtime's execution provider, "cuda" for CUDAExecutionProvider
    precision: str = "fp32"  # of the graph
    cache: Path | None = None  # where a backend may keep what it compiled; None: nowhere
    low_memory: bool = False  # less memory before speed


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


def choose(name: str, precision: str = "fp32") -> str:
    """`auto` is the first backend that is installed and has the precision; any other name is itself, if it does."""
    found = versions()
    able = [known for known in BACKENDS if precision in backend(known).PRECISIONS]
    if name == "auto":
        name = next((known for known in able if found[known]), "")
        if not name:
            extras = " or ".join(f"'dit-export[{known}]'" for known in able)
            raise UsageError(f"no backend for {precision} is installed: pip install {extras}")
    elif backend(name) and found[name] is None:
        raise UsageError(f"backend {name!r} is not installed: pip install 'dit-export[{name}]'")
    elif name not in able:
        raise UsageError(f"backend {name!r} has no {precision}; it has {', '.join(backend(name).PRECISIONS)}")
    return name
