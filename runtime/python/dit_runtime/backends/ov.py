"""OpenVINO on the CPU: compiles the ONNX form when it first sees a shape, and keeps the result in the user's cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.backends import Compiled, Engine, Options
from dit_runtime.bundle.records import GUIDANCE, Stage
from dit_runtime.errors import BundleError, UsageError
from dit_runtime.facts import FACTS
from dit_runtime.progress import Progress

PRECISIONS = tuple(FACTS["precisions"]["openvino"])
FLOAT_AROUND_INT8 = "bf16"
NEEDS_TYPED_GRAPH: tuple[str, ...] = ()
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": FLOAT_AROUND_INT8}  # what OpenVINO computes the fp32 of a graph in
DEVICE = "CPU"
UNLIKE = Path("/sys/devices/cpu_atom")  # where Linux keeps the slower cores of a hybrid CPU


def version() -> str | None:
    try:
        return metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return None


def why_unavailable(built: Mapping[str, Any] | None = None) -> str | None:
    """Return None: it runs on every CPU."""
    return None


def compile(folder: Path, stage: Stage, options: Options, progress: Progress) -> Compiled:
    """Make no files in the bundle: what it compiles fits one CPU, and belongs in the user's cache."""
    return Compiled()


def open(files: Sequence[Path], options: Options) -> Engine:
    engine = OvEngine(files[0], options)
    if options.guided_channels is None or not options.grouped or not _halves(options):
        return engine
    return Halves(engine, options.guided_channels, options.grouped)


def _halves(options: Options) -> bool:
    """Tell whether two runs at once can have half of the threads each: an even number, of cores that are alike."""
    if sys.platform != "linux" or UNLIKE.exists():
        return False
    return (options.threads or len(os.sched_getaffinity(0))) % 2 == 0


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
        self._first: tuple[Any, ...] | None = None
        self._fixed: list[Any] = []
        self._free: dict[int, list[Any]] = {}  # by how many run at once

    def _read(self) -> Any:
        try:
            return self._core.read_model(self._path)
        except Exception as error:  # its exceptions are RuntimeError or Exception itself
            raise BundleError(f"{self._path}: OpenVINO does not open it: {_reason(error)}") from None

    @property
    def io(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self._inputs, self._outputs

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        (outputs,) = self.run_at_once([inputs])
        return outputs

    def run_at_once(self, asked: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """Run all of these, of the same shapes, each on its share of the threads."""
        shapes = [asked[0][name].shape for name in self._inputs]
        if self._first is None:
            self._first, self._fixed = (len(asked), shapes), self._requests(len(asked), shapes)
        if (len(asked), shapes) == self._first:
            requests = self._fixed
        else:
            requests = self._free[len(asked)] = self._free.get(len(asked)) or self._requests(len(asked), None)
        with ExitStack() as running:  # each is waited for, whichever fails
            for request, inputs in zip(requests, asked, strict=True):
                request.start_async({name: inputs[name] for name in self._inputs}, share_inputs=True)
                running.callback(request.wait)
        return [{name: request.get_tensor(name).data.copy() for name in self._outputs} for request in requests]

    def _requests(self, count: int, shapes: Sequence[tuple[int, ...]] | None) -> list[Any]:
        model = self._read()
        settings = self._settings | ({"NUM_STREAMS": count} if count > 1 else {})
        try:
            if shapes is not None:
                model.reshape(dict(zip(self._inputs, map(list, shapes), strict=True)))
            compiled = self._core.compile_model(model, DEVICE, settings)
            return [compiled.create_infer_request() for _ in range(count)]
        except Exception as error:
            raise BundleError(f"{self._path}: OpenVINO does not compile it: {_reason(error)}") from None

    def close(self) -> None:
        self._fixed, self._free, self._core = [], {}, None


class Halves:
    """A step stage whose groups, a sample's own condition and what guidance leads away from, run at once, each on half
    of the threads: that takes less time than both in one batch. Guidance is then mixed here, as the graph would."""

    def __init__(self, engine: OvEngine, guided_channels: int, grouped: tuple[str, ...]) -> None:
        self._engine, self._guided, self._grouped = engine, slice(0, guided_channels), grouped
        self.io, self.close = engine.io, engine.close

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return (B, ...) of (B, ...) and (G, B, ...)."""
        groups = len(inputs[self._grouped[0]])
        if groups == 1:
            return self._engine.run(inputs)
        own = [{name: inputs[name][group : group + 1] for name in self._grouped} for group in range(groups)]
        first, last = self._engine.run_at_once([{**inputs, **rows} for rows in own])
        moved, base = first["prediction"][:, self._guided], last["prediction"][:, self._guided]
        weights = inputs[GUIDANCE].reshape(-1, *(1 for _ in moved.shape[1:]))
        moved[...] = base + weights * (moved - base)
        return first


def _reason(error: Exception) -> str:
    """Return the last line of its message, which says what is wrong; the others are places in its source."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
