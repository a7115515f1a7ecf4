"""A driver, a GPU and a TensorRT that are not here: memory is the host's, and work waits until it must be done.

An engine is y = 2 x, or an ONNX file, whose path is then its plan, on ONNX Runtime.
"""

from __future__ import annotations

import ctypes
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROWS = ((1, 4), (5, 8))  # the two profiles: fewest and most rows


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900


class Cuda:
    """cuda.bindings.runtime, as far as it is used; counts what is open and what was launched."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1)

    def __init__(self, capability: str = "8.9", driver: int = 13020, devices: int = 1, captures: bool = True) -> None:
        self.capability, self.driver, self.devices, self.captures = capability, driver, devices, captures
        self.open: dict[int, object] = {}
        self.numbers = itertools.count(1)
        self.recorded: list | None = None
        self.queued: dict[int, list[Callable[[], None]]] = defaultdict(list)  # by stream: each goes its own way
        self.room: int | None = None  # for so many allocations more; None: any number
        self.launches = 0
        self.copied: Counter[tuple[int, int]] = Counter()  # by kind and size

    def _add(self, thing: object, address: int | None = None) -> int:
        key = address or next(self.numbers)
        self.open[key] = thing
        return key

    def _remove(self, key: int) -> tuple[Status]:
        for stream in [*self.queued]:
            self.finish(stream)
        del self.open[key]  # twice, or what never was, is an error
        return (Status.cudaSuccess,)

    def later(self, work: Callable[[], None], stream: int) -> None:
        (self.queued[stream] if self.recorded is None else self.recorded).append(work)

    def finish(self, stream: int) -> None:
        assert self.recorded is None, "no waiting while work is recorded"
        for work in self.queued.pop(stream, ()):
            work()

    def cudaDriverGetVersion(self):
        return Status.cudaSuccess, self.driver

    def cudaGetDeviceCount(self):
        return Status.cudaSuccess, self.devices

    def cudaGetDevice(self):
        return Status.cudaSuccess, 0

    def cudaDeviceGetAttribute(self, kind, device):
        return Status.cudaSuccess, int(self.capability.split(".")[kind])

    def cudaStreamCreateWithFlags(self, flags):
        return Status.cudaSuccess, self._add("stream")

    def cudaStreamSynchronize(self, stream):
        self.finish(stream)
        return (Status.cudaSuccess,)

    def cudaMalloc(self, size):
        if self.room is not None:
            self.room -= 1
            if self.room < 0:
                return (Status.cudaErrorMemoryAllocation, None)
        memory = ctypes.create_string_buffer(size)
        return Status.cudaSuccess, self._add(memory, ctypes.addressof(memory))

    def cudaMallocHost(self, size):
        return self.cudaMalloc(size)

    def cudaMemcpyAsync(self, into, source, size, kind, stream):
        self.copied[kind, size] += 1
        self.later(lambda: ctypes.memmove(into, source, size), stream)
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        if not self.captures:
            return (Status.cudaErrorStreamCaptureUnsupported,)
        self.recorded = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        work, self.recorded = self.recorded, None
        return Status.cudaSuccess, self._add(work)

    def cudaGraphInstantiate(self, graph, flags):
        return Status.cudaSuccess, self._add(self.open[graph])

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        self.queued[stream].extend(self.open[graph])
        return (Status.cudaSuccess,)

    cudaStreamDestroy = cudaFree = cudaFreeHost = cudaGraphDestroy = cudaGraphExecDestroy = _remove


class TensorRT:
    """The module of either flavour, with one engine: float32 x [rows, 3] in two profiles -> y = 2 x."""

    TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)
    LayerInformationFormat = SimpleNamespace(JSON=1)
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE=1)
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER=1)

    class ILogger:
        ERROR = 1

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.runs, self.opens, self.starts = cuda, 0, True, True
        self.refuses = ""  # the call of a context that says no
        self.refitted: list[str] = []
        self.kernels: list[bytes] = []  # runtime caches that were read
        self.layers: object = []  # what an inspector says of an engine
        self.settings: list[SimpleNamespace] = []  # of contexts that were made

    def refuse(self, call: str) -> bool:
        if call == self.refuses:
            self.logger.log(1, f"{call} is not today's")
        return call == self.refuses

    def Runtime(self, logger):
        self.logger = logger
        if not self.starts:
            raise TypeError("pybind11::init(): factory function returned nullptr")

        def deserialize(plan):
            if not self.opens:
                logger.log(1, "the plan is of another GPU\nand more")
            if not self.opens:
                return None
            self.engine = Engine(self) if plan == b"plan" else OnnxEngine(self, Path(plan.decode()))
            return self.engine

        self.runtime = SimpleNamespace(deserialize_cuda_engine=deserialize, engine_host_code_allowed=False)
        return self.runtime

    def Refitter(self, engine, logger):
        return SimpleNamespace(refit_cuda_engine=lambda: not self.refuse("refit_cuda_engine"))

    def OnnxParserRefitter(self, refitter, logger):
        return SimpleNamespace(refit_from_file=lambda path: self.refitted.append(path) or path.endswith(".onnx"))


class Engine:
    num_io_tensors, num_optimization_profiles, streamable_weights_size = 2, 2, 100
    weight_streaming_budget_v2 = None

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt

    def create_engine_inspector(self):
        return SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": self.trt.layers}))

    def get_weight_streaming_automatic_budget(self):
        return 60

    def get_tensor_name(self, index):
        return ("x", "y")[index]

    def get_tensor_mode(self, name):
        return ("x", "y").index(name)

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name="FLOAT")

    def get_tensor_profile_shape(self, name, profile):
        fewest, most = ROWS[profile]
        return [(fewest, 3), (fewest, 3), (most, 3)]

    def create_runtime_config(self):
        cache = SimpleNamespace(deserialize=self.trt.kernels.append, serialize=lambda: b"kernels")
        self.trt.settings.append(
            SimpleNamespace(create_runtime_cache=lambda: cache, set_runtime_cache=lambda cache: True)
        )
        return self.trt.settings[-1]

    def create_execution_context(self, settings=None):
        return None if self.trt.refuse("create_execution_context") else Context(self.trt)


class Context:
    def __init__(self, trt: TensorRT) -> None:
        self.trt, self.addresses = trt, {}

    def set_optimization_profile_async(self, profile, stream):
        return not self.trt.refuse("set_optimization_profile_async")

    def set_input_shape(self, name, shape):
        self.shape = tuple(shape)
        return not self.trt.refuse("set_input_shape")

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        if self.trt.refuse("execute_async_v3"):
            return False
        shape = self.shape

        def work():
            self.trt.runs += 1
            size = int(np.prod(shape))
            x, y = ((ctypes.c_float * size).from_address(self.addresses[name]) for name in ("x", "y"))
            for index in range(size):
                y[index] = 2 * x[index]

        self.trt.cuda.later(work, stream)
        return True


class OnnxEngine(Engine):
    """A graph of a bundle: two profiles where it has groups; inputs and outputs in an order of its own."""

    def __init__(self, trt: TensorRT, path: Path) -> None:
        import onnxruntime as ort

        super().__init__(trt)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 1
        self.session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        self.inputs = {tensor.name: tensor for tensor in self.session.get_inputs()}
        self.outputs = {tensor.name: tensor for tensor in self.session.get_outputs()}
        stages = json.loads(path.with_name("manifest.json").read_text())["stages"]
        self.most = next(stage["max_batch"] for stage in stages if stage["onnx"] == path.name)
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.num_optimization_profiles = 2 if "guidance" in self.inputs else 1

    def get_tensor_name(self, index):
        return [*self.inputs, *self.outputs][-1 - index]

    def get_tensor_mode(self, name):
        return int(name in self.outputs)

    def get_tensor_dtype(self, name):
        kind = {**self.inputs, **self.outputs}[name].type
        return SimpleNamespace(name="INT64" if kind == "tensor(int64)" else "FLOAT")

    def get_tensor_profile_shape(self, name, profile):
        def shape(rows):
            sizes = {"groups": profile + 1}
            return tuple(sizes.get(size, rows) if isinstance(size, str) else size for size in self.inputs[name].shape)

        return [shape(1), shape(1), shape(self.most)]

    def create_execution_context(self, settings=None):
        return OnnxContext(self)


class OnnxContext(Context):
    def __init__(self, engine: OnnxEngine) -> None:
        super().__init__(engine.trt)
        self.engine, self.shapes = engine, {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        known = {
            symbol: size
            for given, shape in self.shapes.items()
            for symbol, size in zip(self.engine.inputs[given].shape, shape, strict=True)
        }
        return tuple(known.get(size, size) for size in self.engine.outputs[name].shape)

    def execute_async_v3(self, stream):
        def array(name, shape):
            dtype = np.int64 if self.engine.get_tensor_dtype(name).name == "INT64" else np.float32
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype).reshape(shape)

        inputs = {name: array(name, self.shapes[name]) for name in self.engine.inputs}
        outputs = {name: array(name, self.get_tensor_shape(name)) for name in self.engine.outputs}

        def work():
            self.trt.runs += 1
            made = self.engine.session.run(list(outputs), inputs)
            for name, values in zip(outputs, made, strict=True):
                outputs[name][...] = values

        self.trt.cuda.later(work, stream)
        return True
