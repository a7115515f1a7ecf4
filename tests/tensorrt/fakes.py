"""A driver, a GPU and a TensorRT that are not here: memory of the device is the host's, an engine is y = 2 x."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from types import SimpleNamespace

import numpy as np

ROWS = ((1, 4), (5, 8))  # the two profiles: fewest and most rows


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorStreamCaptureUnsupported = 900


class Cuda:
    """cuda.bindings.runtime, as far as it is used; counts what is open and what was launched."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1)

    def __init__(self, capability: str = "8.9", driver: int = 13020, devices: int = 1, captures: bool = True) -> None:
        self.capability, self.driver, self.devices, self.captures = capability, driver, devices, captures
        self.open: dict[int, object] = {}
        self.recorded: list | None = None
        self.launches = 0

    def _add(self, thing: object, address: int | None = None) -> int:
        key = address or len(self.open) + 1
        self.open[key] = thing
        return key

    def _remove(self, key: int) -> tuple[Status]:
        del self.open[key]  # twice, or what never was, is an error
        return (Status.cudaSuccess,)

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
        assert self.recorded is None, "no waiting while work is recorded"
        return (Status.cudaSuccess,)

    def cudaMalloc(self, size):
        memory = ctypes.create_string_buffer(size)
        return Status.cudaSuccess, self._add(memory, ctypes.addressof(memory))

    cudaMallocHost = cudaMalloc

    def cudaMemcpyAsync(self, into, source, size, kind, stream):
        ctypes.memmove(into, source, size)
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
        for work in self.open[graph]:
            work()
        return (Status.cudaSuccess,)

    cudaStreamDestroy = cudaFree = cudaFreeHost = cudaGraphDestroy = cudaGraphExecDestroy = _remove


class TensorRT:
    """The module of either flavour, with one engine: float32 x [rows, 3] in two profiles -> y = 2 x."""

    TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE=1)

    class ILogger:
        ERROR = 1

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.runs, self.opens = cuda, 0, True
        self.kernels: list[bytes] = []  # runtime caches that were read

    def Runtime(self, logger):
        def deserialize(plan):
            if not self.opens:
                logger.log(1, "the plan is of another GPU\nand more")
            return Engine(self) if self.opens else None

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class Engine:
    num_io_tensors, num_optimization_profiles, streamable_weights_size = 2, 2, 0

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt

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
        return SimpleNamespace(create_runtime_cache=lambda: cache, set_runtime_cache=lambda cache: True)

    def create_execution_context(self, settings=None):
        return Context(self.trt)


class Context:
    def __init__(self, trt: TensorRT) -> None:
        self.trt, self.addresses = trt, {}

    def set_optimization_profile_async(self, profile, stream):
        return True

    def set_input_shape(self, name, shape):
        self.shape = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        shape = self.shape

        def work():
            self.trt.runs += 1
            size = int(np.prod(shape))
            x, y = ((ctypes.c_float * size).from_address(self.addresses[name]) for name in ("x", "y"))
            for index in range(size):
                y[index] = 2 * x[index]

        if self.trt.cuda.recorded is None:
            work()
        else:
            self.trt.cuda.recorded.append(work)
        return True
