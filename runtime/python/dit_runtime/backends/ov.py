"""OpenVINO on the CPU: compiles the ONNX form when it first sees a shape, and keeps the result in the user's cache."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.backends import Compiled, Options
from dit_runtime.errors import BundleError, UsageError
from dit_runtime.manifest import Graph
from dit_runtime.progress import Progress

PRECISIONS = ("fp32", "bf16", "int8")
AROUND = "bf16"
TYPED: tuple[str, ...] = ()
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": AROUND}  # what OpenVINO computes the fp32 of a graph in
DEVICE = "CPU"


def version() -> str | None:
    try:
        return metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return None


def obstacle(built: Mapping[str, Any] | None = None) -> str | None:
    """Nothing: it runs on every CPU."""
    return None


def compile(folder: Path, graph: Graph, options: Options, progress: Progress) -> Compiled:
    """No files of its own in the bundle: what it compiles fits one CPU, and belongs in the user's cache."""
    return Compiled()


def open(files: Sequence[Path], options: Options) -> OvEngine:
    return OvEngine(files[0], options)


class OvEngine:
    """The first shape that runs gets a model of its own, which is faster; all others share one with free dimensions."""

    def __init__(self, path: Path, options: Options) -> None:
        try:
            import openvino
        except ImportError:
            raise UsageError("openvino is not installed: pip install 'dit-export[openvino]'") from None

        if options.threads is not None and options.threads < 1:
            raise UsageError(f"threads is {options.threads}; expected 1 or more")
        if options.provider:
            raise UsageError(f"provider {options.provider!r} is an option of onnxruntime; this graph runs on openvino")
        self._path = path
        self._core: Any = openvino.Core()
        self._settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[options.precision],
        }
        if options.threads:
            self._settings["INFERENCE_NUM_THREADS"] = options.threads
        if options.cache is not None:
            with suppress(OSError):  # it only saves time
                options.cache.mkdir(parents=True, exist_ok=True, mode=0o700)
                if os.access(options.cache, os.W_OK):
                    self._settings["CACHE_DIR"] = str(options.cache)
        model = self._read()
        self._inputs = tuple(port.any_name for port in model.inputs)
        self._outputs = tuple(port.any_name for port in model.outputs)
        self._first: tuple[tuple[int, ...], ...] | None = None
        self._fixed: Any = None
        self._free: Any = None

    def _read(self) -> Any:
        try:
            return self._core.read_model(self._path)
        except Exception as error:  # its exceptions are RuntimeError or Exception itself
            raise BundleError(f"{self._path}: OpenVINO does not open it: {_reason(error)}") from None

    @property
    def io(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self._inputs, self._outputs

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        shapes = tuple(inputs[name].shape for name in self._inputs)
        if self._first is None:
            self._first, self._fixed = shapes, self._request(shapes)
        if shapes == self._first:
            request = self._fixed
        else:
            request = self._free = self._free or self._request(None)
        results = request.infer({name: inputs[name] for name in self._inputs}, share_inputs=True)
        return {name: results[name] for name in self._outputs}

    def _request(self, shapes: Sequence[tuple[int, ...]] | None) -> Any:
        model = self._read()
        try:
            if shapes is not None:
                model.reshape(dict(zip(self._inputs, map(list, shapes), strict=True)))
            return self._core.compile_model(model, DEVICE, self._settings).create_infer_request()
        except Exception as error:
            raise BundleError(f"{self._path}: OpenVINO does not compile it: {_reason(error)}") from None

    def close(self) -> None:
        self._fixed = self._free = self._core = None


def _reason(error: Exception) -> str:
    """Its messages open with the places in its source; the last line says what is wrong."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
