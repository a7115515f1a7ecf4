"""A driver and a GPU that are not here: memory is the host's, and work waits until it must be done.

What the real objects free, these free too: work that touches it afterwards fails.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class Cuda:
    """cuda.bindings.runtime, as far as it is used; counts what is open, instantiated and launched."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1)

    def __init__(self, capability: str = "8.9", driver: int = 13020, devices: int = 1, captures: bool = True) -> None:
        self.capability, self.driver, self.devices, self.captures = capability, driver, devices, captures
        self.open: dict[int, object] = {}
        self.numbers = itertools.count(1)
        self.recorded: list | None = None
        self.invalid = False  # what is being recorded cannot be
        self.instantiates = True
        self.free = 8 << 30  # bytes of the device
        self.queued: dict[int, list[Callable[[], None]]] = defaultdict(list)  # by stream: each goes its own way
        self.room: int | None = None  # for so many allocations more; None: any number
        self.instantiated = self.launches = 0
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

    def cudaMemGetInfo(self):
        return Status.cudaSuccess, self.free, 8 << 30

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
        self.recorded, self.invalid = [], False
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        work, self.recorded = self.recorded, None
        if self.invalid:
            return Status.cudaErrorStreamCaptureInvalidated, None
        return Status.cudaSuccess, self._add(work)

    def cudaGraphInstantiate(self, graph, flags):
        if not self.instantiates:
            return Status.cudaErrorMemoryAllocation, None
        self.instantiated += 1
        return Status.cudaSuccess, self._add(self.open[graph])

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        self.queued[stream].extend(self.open[graph])
        return (Status.cudaSuccess,)

    cudaStreamDestroy = cudaFree = cudaFreeHost = cudaGraphDestroy = cudaGraphExecDestroy = _remove
