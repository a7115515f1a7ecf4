"""ONNX Runtime's CUDA provider, whose arrays stay on the GPU. No GPU has run it yet.

The session works in our stream, on our memory. A shape's inputs and outputs have addresses of their own, so that the
provider can record its work on them as a CUDA graph.
"""

from __future__ import annotations

import ctypes
import io
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.backends import Options
from dit_runtime.backends.cuda import Buffer, CudaError, Rows, Stream, call, why_unavailable
from dit_runtime.errors import BundleError, EngineError, UsageError

PROVIDER = "CUDAExecutionProvider"
SETTINGS = {
    "use_tf32": "0",  # fp32 is fp32: TF32 has ten bits
    "cudnn_conv_algo_search": "HEURISTIC",  # the default tries every algorithm at every new shape
    "cudnn_conv_use_max_workspace": "1",
}
ASSIGNMENT = "session.record_ep_graph_assignment_info"
GRAPH, NO_GRAPH = "gpu_graph_id", "-1"
ASYNCHRONOUS = "disable_synchronize_execution_providers"
HEAVY = ("MatMul", "Gemm", "Conv", "Attention", "LayerNormalization")  # ends of ops that must be on the GPU
DTYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
LIBRARIES = ("cudart", "cublasLt", "cublas", "nvrtc", "curand", "cufft", "cudnn")  # each after what it needs
SHAPES = 16  # the last used ones, which keep their memory: with and without guidance, at eight batch sizes
LIBRARY = "libonnxruntime_providers_cuda.so"
Shapes = tuple[tuple[int, ...], ...]


@dataclass
class Bound:
    """The memory of one shape."""

    buffers: dict[str, Buffer]
    shapes: dict[str, tuple[int, ...]]  # of the outputs
    binding: Any
    number: int  # of its CUDA graph
    settings: Any  # of runs that are recorded, or replay what was
    runs: int = 0
    recorded: bool = False


@contextmanager
def selected(number: int) -> Iterator[None]:
    """Make a GPU the calling thread's own, and afterwards the one that was; a pipeline may move between threads."""
    before = call("cudaGetDevice")
    call("cudaSetDevice", number)
    try:
        yield
    finally:
        call("cudaSetDevice", before)


class OrtCudaEngine:
    def __init__(self, ort: Any, path: Path, options: Options, number: int) -> None:
        """Open a graph with the module onnxruntime, on GPU `number`."""
        self._ort = ort
        if reason := why_without(ort):
            raise UsageError(f"provider {options.provider!r} {reason}")
        if reason := why_unavailable():
            raise UsageError(f"provider {options.provider!r} cannot run here: {reason}")
        preload(ort)
        self._number = number
        # An engine that is dropped loses its attributes in this order, and the stream outlives what works in it.
        self._session: Any = None
        self._bound: dict[Shapes, Bound] = {}  # the last used one is the last
        self._records = True
        try:
            with selected(number):
                self._stream: Stream = options.beside._stream if options.beside else Stream()
                self._session = self._open(path, options)
        except CudaError as error:
            raise UsageError(f"provider {options.provider!r} cannot run here: {error}") from None
        if PROVIDER not in self._session.get_providers():
            raise UsageError(f"provider {options.provider!r} did not start here: {_loader_reason(ort)}")
        self._require_placement(path)
        self._inputs = {tensor.name: tensor for tensor in self._session.get_inputs()}
        self._outputs = {tensor.name: tensor for tensor in self._session.get_outputs()}
        for tensor in (*self._inputs.values(), *self._outputs.values()):
            if tensor.type not in DTYPES:
                raise BundleError(f"{path}: {tensor.name} is {tensor.type}; expected {' or '.join(DTYPES)}")
        self._numbers = count(1)
        self._plain = self._run_settings(NO_GRAPH)

    @property
    def io(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return tuple(self._inputs), tuple(self._outputs)

    def put(self, values: np.ndarray) -> Rows:
        with selected(self._number):
            return Rows.put(values, self._stream)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Rows:
        with selected(self._number):
            return Rows.empty(shape, dtype, self._stream)

    def run(self, inputs: Mapping[str, Any], into: Mapping[str, Rows] | None = None) -> dict[str, np.ndarray]:
        with selected(self._number):
            shapes = tuple(tuple(inputs[name].shape) for name in self._inputs)
            bound = self._prepare(shapes)
            for name, target in (into or {}).items():
                if target.shape != bound.shapes[name]:
                    raise EngineError(f"{name} has shape {[*bound.shapes[name]]}, expected {[*target.shape]}")
            for name in self._inputs:
                bound.buffers[name].upload(inputs[name], self._stream)
            self._enqueue(bound)
            if into is not None:
                for name, target in into.items():
                    target.fill(bound.buffers[name].device)
                return {}
            views = {name: bound.buffers[name].download(shape, self._stream) for name, shape in bound.shapes.items()}
            self._stream.wait()
            return {name: view.copy() for name, view in views.items()}

    def close(self) -> None:
        if self._session is None:
            return
        with selected(self._number):
            self._stream.wait()
            for shapes in self._bound:
                self._bound[shapes].binding = None  # which belongs to the session
            self._session = None  # what it has recorded reads and writes the memory
            self._bound.clear()
            del self._stream

    def _open(self, path: Path, options: Options) -> Any:
        """Open a session that records, or where ONNX Runtime cannot record this graph, one that does not."""
        ort = self._ort
        while True:
            settings = ort.SessionOptions()
            settings.log_severity_level = 4
            settings.add_session_config_entry(ASSIGNMENT, "1")
            if options.threads:
                settings.intra_op_num_threads = options.threads
            provider = SETTINGS | {
                "device_id": str(self._number),
                "user_compute_stream": str(int(self._stream)),
                "enable_cuda_graph": str(int(self._records)),
            }
            try:
                return ort.InferenceSession(path, settings, providers=[(PROVIDER, provider)], enable_fallback=0)
            except Exception as error:  # its exceptions share no base class but this
                reason = str(error).partition("\n")[0]
                if not self._records or "graph capture" not in str(error):
                    raise BundleError(f"{path}: ONNX Runtime does not open it: {reason}") from None
                self._without(reason)

    def _require_placement(self, path: Path) -> None:
        """Refuse a session that left heavy nodes to the CPU."""
        wrong: Counter[str] = Counter()
        for part in self._session.get_provider_graph_assignment_info():
            if part.ep_name != PROVIDER:
                wrong.update(node.op_type for node in part.get_nodes() if node.op_type.endswith(HEAVY))
        if wrong:
            listed = ", ".join(f"{number} {kind}" for kind, number in sorted(wrong.items()))
            raise UsageError(f"{path}: ONNX Runtime has no CUDA kernel for {listed}; use provider cpu")

    def _run_settings(self, number: str) -> Any:
        settings = self._ort.RunOptions()
        settings.add_run_config_entry(GRAPH, number)
        settings.add_run_config_entry(ASYNCHRONOUS, "1")  # the stream is ours, and we wait for it
        return settings

    def _prepare(self, shapes: Shapes) -> Bound:
        """Return the memory of a shape; a new one takes the place of the one not used for longest."""
        bound = self._bound.pop(shapes, None)
        if bound is None:
            while len(self._bound) >= SHAPES:
                self._stream.wait()  # for what is queued there
                oldest = self._bound.pop(next(iter(self._bound)))
                if oldest.recorded:
                    self._session.release_captured_graph(oldest.number)
            bound = self._bind(shapes)
        self._bound[shapes] = bound
        return bound

    def _bind(self, shapes: Shapes) -> Bound:
        """Allocate the memory of a shape, and bind it."""
        sizes: dict[str, int] = {}
        for (name, tensor), shape in zip(self._inputs.items(), shapes, strict=True):
            fits = len(tensor.shape) == len(shape)
            for symbol, size in zip(tensor.shape, shape, strict=False):
                expected = sizes.setdefault(symbol, size) if isinstance(symbol, str) else symbol
                fits = fits and size == expected
            if not fits:
                raise UsageError(f"{name} has shape {[*shape]}, expected {[*tensor.shape]}")
        outputs = {
            name: tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
            for name, tensor in self._outputs.items()
        }
        arrays = dict(zip(self._inputs, shapes, strict=True)) | outputs
        tensors = self._inputs | self._outputs
        kinds = {name: DTYPES[tensor.type] for name, tensor in tensors.items()}
        buffers = {name: Buffer(shape, np.dtype(kinds[name])) for name, shape in arrays.items()}
        binding = self._session.io_binding()
        for name, buffer in buffers.items():
            bind = binding.bind_input if name in self._inputs else binding.bind_output
            bind(name, "cuda", self._number, kinds[name], arrays[name], buffer.device)
        number = next(self._numbers)
        return Bound(buffers, outputs, binding, number, self._run_settings(str(number)))

    def _enqueue(self, bound: Bound) -> None:
        """Run; a shape's first run sets everything up, the second is recorded, later ones replay it."""
        if not self._records or not bound.runs:
            self._session.run_with_iobinding(bound.binding, self._plain)
        else:
            try:
                self._session.run_with_iobinding(bound.binding, bound.settings)
                bound.recorded = True
            except Exception as error:
                if bound.recorded:
                    raise
                self._without(str(error).partition("\n")[0])
                self._session.run_with_iobinding(bound.binding, self._plain)
        bound.runs += 1

    def _without(self, reason: str) -> None:
        self._records = False
        print(f"no CUDA graph of ONNX Runtime's work, it runs without: {reason}", file=sys.stderr)


def why_without(ort: Any) -> str | None:
    """Return what to install where the module onnxruntime was built without the provider."""
    if PROVIDER in ort.get_available_providers():
        return None
    return "is not in this onnxruntime: pip uninstall onnxruntime; pip install 'dit-runtime[onnxruntime-gpu]'"


def preload(ort: Any) -> None:
    """Load CUDA's libraries from where Python packages have them; the provider finds those that are loaded."""
    with redirect_stdout(io.StringIO()):  # it prints what it does not find beside itself
        ort.preload_dlls()
    try:
        folders = [Path(folder) for folder in import_module("nvidia").__path__]
    except ImportError:
        return
    for name in LIBRARIES:
        for library in sorted(file for folder in folders for file in folder.glob(f"*/lib/lib{name}.so.*")):
            try:
                ctypes.CDLL(library.name)  # is it loaded, or on the loader's path?
            except OSError:
                with suppress(OSError):  # the provider's own refusal says what it lacks
                    ctypes.CDLL(str(library))


def _loader_reason(ort: Any) -> str:
    """Return why the provider's library does not load, after ONNX Runtime has tried; before, this would break it."""
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / LIBRARY))
    except OSError as error:
        return str(error)
    return "its library loads, and ONNX Runtime does not take it"
