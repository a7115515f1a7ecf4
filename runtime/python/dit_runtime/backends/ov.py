"""OpenVINO on the CPU.

A stage of the loop, and the decoder, runs a row at a time: one sample, and of a step stage one of its groups. Two rows
of a step run at once, each on half of the threads; that takes less time than both in one batch. So there is one shape,
and a row's bits depend neither on its batch nor on what ran before. It is compiled when the stage is opened, and a
second time when a call first has a single row, which gets all threads; each copy packs the weights. Stages before the
loop keep their free dimension: their rows come out the same at any number of rows.

Threads are not tied to cores: OpenVINO counts what each open model has taken, and gave all threads of a decoder, opened
beside a step stage, the same core.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.backends import Compiled, Engine, Options
from dit_runtime.bundle.records import GUIDANCE, Stage
from dit_runtime.errors import BundleError, UsageError
from dit_runtime.facts import CONSTANTS, FACTS
from dit_runtime.progress import Progress

PRECISIONS = tuple(FACTS["precisions"]["openvino"])
FLOAT_AROUND_INT8 = "bf16"
NEEDS_TYPED_GRAPH: tuple[str, ...] = ()
DEVICE = "CPU"
HINTS = {"fp32": "f32", "bf16": "bf16"}  # the names that OpenVINO has for the types of floats
MEETING: str = CONSTANTS["groups_meet"]  # the tensor of a step stage that has all groups, before guidance mixes them
# Requests of a stream of a step stage: it goes on with the next row while Python takes an answer, or waits for another
# thread's turn to end. Activations belong to the stream, so a request costs its inputs and outputs.
QUEUED = 8
DONTNEED = 4  # of madvise, on Linux
UNLIKE = Path("/sys/devices/cpu_atom")  # where Linux keeps the slower cores of a hybrid CPU


def version() -> str | None:
    try:
        return metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return None


def why_unavailable(built: Mapping[str, Any] | None = None) -> str | None:
    """Return None: it runs on every CPU."""
    return None


def float_type(precision: str) -> str:
    """Return the type that floats are computed in here: where a CPU has no bf16, to emulate it takes five times as long
    as fp32."""
    return "bf16" if precision != "fp32" and "BF16" in capabilities() else "fp32"


@cache
def capabilities() -> frozenset[str]:
    """Return what OpenVINO says that this CPU computes."""
    return frozenset(_openvino().Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"))


def compile(folder: Path, stage: Stage, options: Options, progress: Progress) -> Compiled:
    """Make no files: what it compiles fits one CPU, and is made anew when a bundle is opened."""
    return Compiled()


def open(files: Sequence[Path], options: Options) -> Engine:
    return (RowEngine if options.row else OvEngine)(files, options)


def _openvino() -> Any:
    """Import OpenVINO without its telemetry, which also writes into the user's home."""
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)
    try:
        import openvino
    except ImportError:
        raise UsageError("openvino is not installed: pip install 'dit-runtime[openvino]'") from None
    return openvino


class OvEngine:
    """A stage whose rows run in one call, any number of them."""

    def __init__(self, files: Sequence[Path], options: Options) -> None:
        if options.threads is not None and options.threads < 1:
            raise UsageError(f"threads is {options.threads}; expected 1 or more")
        if options.provider:
            raise UsageError(f"provider {options.provider!r} is an option of onnxruntime; this graph runs on openvino")
        self._path, self._options = files[0], options
        self._written = {file: _written(file) for file in files}
        self._core: Any = _openvino().Core()
        self._settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": HINTS[float_type(options.precision)],
        }
        if options.threads:
            self._settings["INFERENCE_NUM_THREADS"] = options.threads
        try:
            model = self._core.read_model(self._path)
        except Exception as error:  # its exceptions are RuntimeError or Exception itself
            raise BundleError(f"{self._path}: OpenVINO does not open it: {_reason(error)}") from None
        self.io = tuple(port.any_name for port in model.inputs), tuple(port.any_name for port in model.outputs)
        with self._compiling():
            self._prepare(model)

    def _prepare(self, model: Any) -> None:
        (self._request,) = self._compile(model)

    def _require_unwritten(self) -> None:
        """Refuse weights that were overwritten since their sums were compared: what is not compiled yet reads them.

        A file that was put in another's place changes nothing: the model has the one that it opened.
        """
        for file, (inode, *was) in self._written.items():
            now, *written = _written(file)
            if now == inode and written != was:
                raise BundleError(f"{file}: was written while it was open; open the bundle again")

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        try:
            yield
        except BundleError:
            raise
        except Exception as error:
            raise BundleError(f"{self._path}: OpenVINO does not compile it: {_reason(error)}") from None

    def _compile(self, model: Any, count: int = 1, **settings: Any) -> list[Any]:
        """Return so many requests."""
        compiled = self._core.compile_model(model, DEVICE, self._settings | settings)
        requests = [compiled.create_infer_request() for _ in range(count)]
        _give_back(self._path.parent)
        return requests

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._request.infer({name: inputs[name] for name in self.io[0]}, share_inputs=True)
        return {name: self._request.get_tensor(name).data.copy() for name in self.io[1]}

    def close(self) -> None:
        self._request = self._core = None


class RowEngine(OvEngine):
    """A stage whose rows run apart. Where a step stage mixes its groups, the graph is cut in two where they meet: the
    groups run apart as well, and what mixes them runs once, on all rows."""

    def _prepare(self, model: Any) -> None:
        self._grouped = frozenset(self._options.grouped)
        self._requests: dict[Any, list[Any]] = {}  # by shapes and streams
        self._mix: Any = None
        self._model = model  # never read again: what is compiled later is a copy of what was checked
        rows = self._cut(own := model.clone())
        mixes = rows is not own
        self._names = tuple(name for name in self.io[0] if not mixes or name != GUIDANCE)
        known = all(name in self._options.row for name in self._names)  # else the caller refuses the graph
        if known and (mixes or not self._grouped):  # else a row has as many groups as a call brings
            shapes = tuple(self._options.row[name] for name in self._names)
            self._fixed(shapes, self._at_once if mixes else 1, rows)

    @property
    def _at_once(self) -> int:
        """Return how many rows run at once: two where each can have half of the threads, of cores that are alike."""
        if sys.platform != "linux" or UNLIKE.exists() or self._options.low_memory:
            return 1
        threads = self._options.threads or len(os.sched_getaffinity(0))
        return min(self._options.at_once, 2 if threads % 2 == 0 else 1)

    def _cut(self, model: Any) -> Any:
        """Return the model of a row; where groups meet in it, keep what mixes them."""
        outputs = (output for node in model.get_ordered_ops() for output in node.outputs())
        meeting = next((output for output in outputs if MEETING in output.get_names()), None)
        if meeting is None or GUIDANCE not in self.io[0]:
            return model
        from openvino import Model, opset13

        parameter = opset13.parameter(meeting.get_partial_shape(), meeting.get_element_type())
        for reader in meeting.get_target_inputs():
            reader.replace_source_output(parameter.output(0))
        parameter.output(0).set_names({MEETING})
        ports = {port.any_name: port.get_node() for port in model.inputs}
        weights = ports.pop(GUIDANCE)
        if self._mix is None:
            mix = Model(model.get_results(), [parameter, weights])
            (self._mix,) = self._compile(mix, INFERENCE_PRECISION_HINT="f32")
        return Model([opset13.result(meeting)], [*ports.values()])

    def _fixed(self, shapes: tuple[tuple[int, ...], ...], streams: int, model: Any = None) -> list[Any]:
        """Return requests for rows of these shapes, as many for each stream."""
        if (shapes, streams) not in self._requests:
            with self._compiling():
                if model is None:
                    self._require_unwritten()
                    model = self._cut(self._model.clone())
                model.reshape(dict(zip(self._names, map(list, shapes), strict=True)))
                count = streams * (QUEUED if self._grouped else 1)
                self._requests[shapes, streams] = self._compile(model, count, NUM_STREAMS=streams)
        return self._requests[shapes, streams]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return (B, ...) of (B, ...) and (G, B, ...)."""
        asked = self._rows(inputs)
        shapes = tuple(asked[0][name].shape for name in self._names)
        requests = self._fixed(shapes, min(len(asked), self._at_once))
        answers: list[list[np.ndarray]] = []
        with ExitStack() as running:  # each is waited for, whichever fails
            for number, row in enumerate(asked):
                request = requests[number % len(requests)]
                if number >= len(requests):
                    answers.append(self._answer(request))
                request.start_async(row, share_inputs=True)
                running.callback(request.wait)
            answers += [self._answer(requests[number % len(requests)]) for number in range(len(answers), len(asked))]
        rows = [np.concatenate(parts) for parts in zip(*answers, strict=True)]
        if self._mix is None:
            return dict(zip(self.io[1], rows, strict=True))
        (met,) = rows  # (G B, 1, ...)
        weights = inputs[GUIDANCE]
        met = met.reshape(-1, len(weights), *met.shape[2:])
        self._mix.infer({MEETING: met, GUIDANCE: weights}, share_inputs=True)
        return {name: self._mix.get_tensor(name).data.copy() for name in self.io[1]}

    def _rows(self, inputs: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Return the inputs of each row: the samples of a group, then those of the next."""
        batch = next(len(inputs[name]) for name in self._names if name not in self._grouped)
        groups = [slice(None)]
        if self._mix is not None:
            count = next((len(inputs[name]) for name in self._grouped), 1)
            groups = [slice(group, group + 1) for group in range(count)]
        return [
            {
                name: np.ascontiguousarray(inputs[name][(group, row) if name in self._grouped else row])
                for name in self._names
            }
            for group in groups
            for row in (slice(sample, sample + 1) for sample in range(batch))
        ]

    def _answer(self, request: Any) -> list[np.ndarray]:
        request.wait()
        return [request.get_output_tensor(index).data.copy() for index in range(len(request.model_outputs))]

    def close(self) -> None:
        self._requests, self._mix, self._model, self._core = {}, None, None, None


def _written(file: Path) -> tuple[int, ...]:
    """Return which file this is, and numbers that change when it is written; zeros where it is gone."""
    try:
        status = file.stat()
    except OSError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns


def _give_back(folder: Path) -> None:
    """Give back the memory in which the folder's weights are mapped: what is compiled has packed them for itself. It
    keeps the file mapped, though, and the pages that were read would stay, 44 % of the process's memory for XL/2."""
    if sys.platform != "linux":
        return
    import ctypes  # here, so that importing the runtime stays quick

    library, prefix = ctypes.CDLL(None), f"{folder.resolve()}/"
    for line in Path("/proc/self/maps").read_text(errors="replace").split("\n"):
        span, rights, *_, path = [*line.split(None, 5), "", ""][:6] if line else ("", "", "")
        if path.startswith(prefix) and rights == "r--s":  # shared and only read: what is read again is as it was
            first, last = (int(address, 16) for address in span.split("-"))
            library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), DONTNEED)


def _reason(error: Exception) -> str:
    """Return the last line of its message, which says what is wrong; the others are places in its source."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
