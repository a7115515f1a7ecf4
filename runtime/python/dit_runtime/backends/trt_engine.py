"""An engine of either TensorRT at work, on CUDA alone: buffers are made once, contexts once a shape."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_runtime import cache
from dit_runtime.backends import Options
from dit_runtime.backends.cuda import Buffer, CudaError, Memory, Recording, Rows, Stream
from dit_runtime.backends.trt_network import logger_of, runtime_of
from dit_runtime.errors import BundleError, EngineError, UsageError

if TYPE_CHECKING:
    from dit_runtime.backends.trt import Flavour

DTYPES: dict[str, type[np.generic]] = {"FLOAT": np.float32, "INT64": np.int64}
KERNELS = "kernels.checked"  # TensorRT-RTX's runtime cache, after its sum
SHAPES = 16  # the last used ones, which keep their contexts: two profiles of eight batch sizes
Shapes = tuple[tuple[int, ...], ...]  # of the inputs, in their order


@dataclass
class Execution:
    """A context of one shape, and its CUDA graph.

    A graph holds while nothing changes in the context that it was captured from. So each shape has a context, and is
    captured once; all contexts share the memory of their activations, for one stream runs them in turn.
    """

    context: Any
    outputs: dict[str, tuple[int, ...]]  # their shapes
    ran: bool = False
    recording: Recording | None = None


class TrtEngine:
    """The contexts of an engine by shape, the buffers that they are bound to, and the stream that they run in."""

    def __init__(self, flavour: Flavour, files: Sequence[Path], options: Options, command: str) -> None:
        self._flavour, self._trt = flavour, flavour.load()
        trt = self._trt
        self._logger = logger_of(trt)
        tuning = options.built.get("tuning", {})
        host_code = "version_compatible" in tuning  # whose sha256 has been checked
        self._runtime = runtime_of(trt, flavour.name, self._logger, host_code)
        self._engine: Any = self._runtime.deserialize_cuda_engine(files[0].read_bytes())
        if self._engine is None:
            reason = f"{flavour.name} does not open it: {self._logger.last}"
            raise BundleError(f"{files[0]}: {reason}; on the target, make it with: {command}")
        if len(files) > 1:  # stripped: its weights are in the ONNX form
            refitter = trt.Refitter(self._engine, self._logger)
            weights = trt.OnnxParserRefitter(refitter, self._logger)  # owns what the refitter reads
            if not weights.refit_from_file(str(files[1])) or not refitter.refit_cuda_engine():
                raise BundleError(f"{files[0]}: its weights are not those of {files[1].name}: {self._logger.last}")
        streams = "weight_streaming" in tuning  # each run then waits for weights, which no CUDA graph can
        if self._engine.streamable_weights_size and streams:
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        into = {name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self._inputs = tuple(name for name in names if name in into)
        self._outputs = tuple(name for name in names if name not in into)
        self._stream: Stream = options.beside._stream if options.beside else Stream()
        self._kernels = options.cache / f"{files[0].stem}.{KERNELS}" if options.cache else None
        self._runtime_cache: Any = None
        self._bounds = [
            [self._bound(name, profile) for name in self._inputs]
            for profile in range(self._engine.num_optimization_profiles)
        ]
        self._activations = Memory(max(1, self._engine.device_memory_size_v2), self._stream)
        self._executions: dict[Shapes, Execution] = {}  # the last used one is the last
        self._buffers = self._allocate()
        for execution in self._executions.values():
            self._bind(execution.context)
        self._records = not flavour.own_graphs and not streams

    @property
    def io(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self._inputs, self._outputs

    def put(self, values: np.ndarray) -> Rows:
        return Rows.put(values, self._stream)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Rows:
        return Rows.empty(shape, dtype, self._stream)

    def run(self, inputs: Mapping[str, Any], into: Mapping[str, Rows] | None = None) -> dict[str, np.ndarray]:
        shapes = tuple(inputs[name].shape for name in self._inputs)
        execution = self._prepare(shapes)
        for name, rows in (into or {}).items():
            if rows.shape != execution.outputs[name]:
                raise EngineError(f"{name} has shape {[*execution.outputs[name]]}, expected {[*rows.shape]}")
        for name in self._inputs:
            self._buffers[name].upload(inputs[name], self._stream)
        self._enqueue(execution)
        if into is not None:
            for name, rows in into.items():
                rows.fill(self._buffers[name].device)
            return {}
        views = {name: self._buffers[name].download(shape, self._stream) for name, shape in execution.outputs.items()}
        self._stream.wait()
        return {name: view.copy() for name, view in views.items()}

    def _prepare(self, shapes: Shapes) -> Execution:
        """Return the execution of these shapes; a new one takes the place of the one not used for longest."""
        execution = self._executions.pop(shapes, None)
        if execution is None:
            while len(self._executions) >= SHAPES:
                self._stream.wait()  # for what is queued there
                del self._executions[next(iter(self._executions))]
            execution = self._execution(self._profile(shapes), shapes)
            self._bind(execution.context)
        self._executions[shapes] = execution
        return execution

    def _profile(self, shapes: Shapes) -> int:
        """Return the profile that takes these shapes."""
        for profile, bounds in enumerate(self._bounds):
            if all(_within(shape, bound) for shape, bound in zip(shapes, bounds, strict=True)):
                return profile
        asked = ", ".join(f"{name} {list(shape)}" for name, shape in zip(self._inputs, shapes, strict=True))
        raise UsageError(f"no profile of this engine takes {asked}; rebuild it with a larger --max-batch")

    def _enqueue(self, execution: Execution) -> None:
        """Replay the recording; the first run of a shape sets everything up, the second is recorded."""
        if execution.recording is not None:
            execution.recording.launch()
            return
        context = execution.context
        if not context.execute_async_v3(int(self._stream)):
            raise EngineError(f"{self._flavour.name} does not run: {self._logger.last}")
        if self._records and execution.ran:
            execution.recording = self._record(context)
        execution.ran = True

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

    def _execution(self, profile: int, shapes: Shapes) -> Execution:
        """Make a context of a profile for these shapes; nothing is bound to it yet."""
        trt = self._trt
        owned = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._flavour.keeps_kernels:
            settings = self._engine.create_runtime_config()
            settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            # Lazily, a shape's first runs would go by other kernels than its later ones, to other bits.
            settings.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if self._runtime_cache is None:
                self._runtime_cache = settings.create_runtime_cache()
                if self._kernels is not None and (kernels := cache.read(self._kernels)):
                    self._runtime_cache.deserialize(kernels)  # another driver's are not taken
            settings.set_runtime_cache(self._runtime_cache)
            settings.set_execution_context_allocation_strategy(owned)
            context = self._engine.create_execution_context(settings)
        else:
            context = self._engine.create_execution_context(owned)
        if context is None:
            raise UsageError(f"{self._flavour.name} has no memory for this engine: {self._logger.last}")
        context.nvtx_verbosity = trt.ProfilingVerbosity.NONE  # the build's DETAILED makes each enqueue slower
        if not context.set_optimization_profile_async(profile, int(self._stream)):
            raise EngineError(f"{self._flavour.name} does not set profile {profile}: {self._logger.last}")
        self._stream.wait()
        for name, shape in zip(self._inputs, shapes, strict=True):
            if not context.set_input_shape(name, shape):
                raise EngineError(f"{self._flavour.name} does not take {name} {list(shape)}: {self._logger.last}")
        context.set_device_memory(self._activations.address, self._activations.size)
        return Execution(context, {name: self._output(context, name) for name in self._outputs})

    def _output(self, context: Any, name: str) -> tuple[int, ...]:
        """Return the shape of an output, which must be known before the run."""
        shape: tuple[int, ...] = (-1,)
        with suppress(ValueError):  # Dims of -1 dimensions
            shape = tuple(context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise EngineError(f"{self._flavour.name} does not know the shape of {name}: {self._logger.last}")
        return shape

    def _bound(self, name: str, profile: int) -> list[tuple[int, ...]]:
        """Return an input's smallest, usual and largest shape; a static one is in no profile."""
        shape = tuple(self._engine.get_tensor_shape(name))
        if -1 not in shape:
            return [shape] * 3
        return [tuple(bound) for bound in self._engine.get_tensor_profile_shape(name, profile)]

    def _allocate(self) -> dict[str, Buffer]:
        """Allocate each tensor for its largest shape in any profile, and keep the profiles' largest executions."""
        largest: dict[str, tuple[int, ...]] = {}
        for profile, bounds in enumerate(self._bounds):
            most = tuple(bound[-1] for bound in bounds)
            execution = self._executions[most] = self._execution(profile, most)
            for name, shape in [*zip(self._inputs, most, strict=True), *execution.outputs.items()]:
                largest[name] = max(largest.get(name, ()), shape, key=_size)
        return {name: Buffer(shape, self._dtype(name)) for name, shape in largest.items()}

    def _bind(self, context: Any) -> None:
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, buffer.device):
                raise EngineError(f"{self._flavour.name} does not bind {name}: {self._logger.last}")

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
            self._executions.clear()
            self._buffers.clear()
            del self._activations, self._stream
            self._runtime_cache = self._engine = self._runtime = None
        if kernels and self._kernels is not None:
            cache.write(self._kernels, kernels)


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape)) if shape else 0


def _within(shape: Sequence[int], bound: Sequence[Sequence[int]]) -> bool:
    least, _, most = bound
    return len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
