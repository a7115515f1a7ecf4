"""An engine of either TensorRT at work, on CUDA alone: buffers are made once, and bound once."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_runtime.backends import Options
from dit_runtime.backends.cuda import Buffer, CudaError, Recording, Rows, Stream
from dit_runtime.backends.trt_network import logger_of, started
from dit_runtime.errors import BundleError, EngineError, UsageError

if TYPE_CHECKING:
    from dit_runtime.backends.trt import Flavour

DTYPES: dict[str, type[np.generic]] = {"FLOAT": np.float32, "INT64": np.int64}
KERNELS = "kernels.bin"  # TensorRT-RTX's runtime cache
Shapes = tuple[tuple[int, ...], ...]


class TrtEngine:
    """One context a profile, and a CUDA graph of its work while one shape runs again and again."""

    def __init__(self, flavour: Flavour, files: Sequence[Path], options: Options, command: str) -> None:
        self._flavour, trt = flavour, flavour.load()
        self._logger = logger_of(trt)
        self._runtime = started(flavour.name, trt.Runtime, self._logger)
        if "version_compatible" in options.built.get("tuning", {}):
            self._runtime.engine_host_code_allowed = True  # such a plan brings its runtime; its sha256 has been checked
        self._engine: Any = self._runtime.deserialize_cuda_engine(files[0].read_bytes())
        if self._engine is None:
            reason = f"{flavour.name} does not open it: {self._logger.last}"
            raise BundleError(f"{files[0]}: {reason}; on the target, make it with: {command}")
        if len(files) > 1:  # stripped: its weights are in the ONNX form
            refitter = trt.Refitter(self._engine, self._logger)
            fits = trt.OnnxParserRefitter(refitter, self._logger).refit_from_file(str(files[1]))
            if not fits or not refitter.refit_cuda_engine():
                raise BundleError(f"{files[0]}: its weights are not those of {files[1].name}: {self._logger.last}")
        if self._engine.streamable_weights_size and "weight_streaming" in options.built.get("tuning", {}):
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        into = {name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self._inputs = tuple(name for name in names if name in into)
        self._outputs = tuple(name for name in names if name not in into)
        self._stream: Stream = options.beside._stream if options.beside else Stream()
        self._kernels = options.cache / f"{files[0].stem}.{KERNELS}" if options.cache else None
        self._runtime_cache: Any = None
        self._contexts = [self._context(trt, index) for index in range(self._engine.num_optimization_profiles)]
        self._bounds = [
            [self._engine.get_tensor_profile_shape(name, index) for name in self._inputs]
            for index in range(len(self._contexts))
        ]
        self._buffers = self._allocate()
        self._records = not flavour.own_graphs
        self._recorded: dict[int, tuple[Shapes, Recording | None]] = {}  # by profile

    @property
    def io(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self._inputs, self._outputs

    def put(self, values: np.ndarray) -> Rows:
        return Rows.put(values, self._stream)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Rows:
        return Rows.empty(shape, dtype, self._stream)

    def run(self, inputs: Mapping[str, Any], into: Mapping[str, Rows] | None = None) -> dict[str, np.ndarray]:
        shapes = tuple(inputs[name].shape for name in self._inputs)
        profile, context = self._fitting(shapes)
        for name in self._inputs:
            self._shape(context, name, inputs[name].shape)
            self._buffers[name].upload(inputs[name], self._stream)
        self._enqueue(profile, context, shapes)
        if into is not None:
            for name, rows in into.items():
                rows.fill(self._buffers[name].device)
            return {}
        views = {
            name: self._buffers[name].download(tuple(context.get_tensor_shape(name)), self._stream)
            for name in self._outputs
        }
        self._stream.wait()
        return {name: view.copy() for name, view in views.items()}

    def _fitting(self, shapes: Shapes) -> tuple[int, Any]:
        """Return the profile that takes these shapes, and its context."""
        for index, context in enumerate(self._contexts):
            if all(_within(shape, bound) for shape, bound in zip(shapes, self._bounds[index], strict=True)):
                return index, context
        asked = ", ".join(f"{name} {list(shape)}" for name, shape in zip(self._inputs, shapes, strict=True))
        raise UsageError(f"no profile of this engine takes {asked}; rebuild it with a larger --max-batch")

    def _enqueue(self, profile: int, context: Any, shapes: Shapes) -> None:
        """Replay what was recorded of these shapes; their first run sets everything up, the second is recorded."""
        before, recording = self._recorded.get(profile, (None, None))
        if before == shapes and recording is not None:
            recording.launch()
            return
        if not context.execute_async_v3(int(self._stream)):
            raise EngineError(f"{self._flavour.name} does not run: {self._logger.last}")
        if not self._records:
            return
        if recording is not None:  # a context has one recording: another shape may move its memory
            self._stream.wait()
        self._recorded[profile] = shapes, self._record(context) if before == shapes else None

    def _record(self, context: Any) -> Recording | None:
        recording = Recording(self._stream)
        self._stream.wait()
        try:
            with recording:
                if not context.execute_async_v3(int(self._stream)):
                    raise CudaError(self._logger.last)
        except CudaError as error:
            print(f"no CUDA graph of {self._flavour.name}'s work, it runs without: {error}", file=sys.stderr)
            self._records = False
            return None
        return recording

    def _context(self, trt: Any, profile: int) -> Any:
        if self._flavour.keeps_kernels:
            settings = self._engine.create_runtime_config()
            settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            # Lazily, a shape's first runs would go by other kernels than its later ones, to other bits.
            settings.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if self._runtime_cache is None:
                self._runtime_cache = settings.create_runtime_cache()
                if self._kernels is not None:
                    with suppress(OSError):  # there are none, or they cannot be read; another driver's are not taken
                        self._runtime_cache.deserialize(self._kernels.read_bytes())
            settings.set_runtime_cache(self._runtime_cache)
            context = self._engine.create_execution_context(settings)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise UsageError(f"{self._flavour.name} has no memory for this engine: {self._logger.last}")
        if not context.set_optimization_profile_async(profile, int(self._stream)):
            raise EngineError(f"{self._flavour.name} does not set profile {profile}: {self._logger.last}")
        self._stream.wait()
        return context

    def _shape(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        if not context.set_input_shape(name, shape):
            raise EngineError(f"{self._flavour.name} does not take {name} {list(shape)}: {self._logger.last}")

    def _allocate(self) -> dict[str, Buffer]:
        """Allocate the largest shape of any profile, bound in every context."""
        largest: dict[str, tuple[int, ...]] = {}
        for index, context in enumerate(self._contexts):
            for name, (_, _, most) in zip(self._inputs, self._bounds[index], strict=True):
                shape = tuple(most)
                self._shape(context, name, shape)
                largest[name] = max(largest.get(name, ()), shape, key=_size)
            for name in self._outputs:
                largest[name] = max(largest.get(name, ()), tuple(context.get_tensor_shape(name)), key=_size)
        buffers = {name: Buffer(shape, self._dtype(name)) for name, shape in largest.items()}
        for context in self._contexts:
            for name, buffer in buffers.items():
                context.set_tensor_address(name, buffer.device)
        return buffers

    def _dtype(self, name: str) -> np.dtype[Any]:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise BundleError(f"{name} is {kind} in this engine; expected {' or '.join(DTYPES)}")
        return np.dtype(DTYPES[kind])

    def close(self) -> None:
        """Give everything back, in the order of needs; the kernels that were compiled here are kept for the next."""
        if self._engine is None:
            return
        kernels = b""
        try:
            self._stream.wait()
            if self._runtime_cache is not None:
                kernels = bytes(self._runtime_cache.serialize())
        finally:
            self._recorded.clear()
            self._contexts.clear()
            self._buffers.clear()
            del self._stream
            self._runtime_cache = self._engine = self._runtime = None
        if kernels and self._kernels is not None:
            with suppress(OSError):  # it only saves time
                self._kernels.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with NamedTemporaryFile(dir=self._kernels.parent, prefix=self._kernels.stem, delete=False) as part:
                    try:
                        part.write(kernels)
                        part.flush()
                        Path(part.name).replace(self._kernels)
                    except BaseException:
                        Path(part.name).unlink(missing_ok=True)
                        raise


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape)) if shape else 0


def _within(shape: Sequence[int], bound: Sequence[Sequence[int]]) -> bool:
    least, _, most = bound
    return len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
