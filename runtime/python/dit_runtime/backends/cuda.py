"""The few calls of CUDA's runtime that an engine needs, through cuda-bindings; importing this asks for no driver."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import EngineError, UsageError


class CudaError(EngineError):
    """A call that failed; its message is CUDA's own name for why."""


def runtime() -> Any:
    try:
        from cuda.bindings import runtime as cudart
    except ImportError:
        raise UsageError("cuda-bindings is not installed: pip install cuda-bindings") from None
    return cudart


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the runtime; return its result, or raise CudaError."""
    status, *results = getattr(runtime(), name)(*arguments)
    if int(status):
        raise CudaError(f"{name}: {status.name}")
    return results[0] if results else None


def _lend(owner: object, handle: Any, name: str) -> Any:
    """Return the handle; the function `name` gives it back when nobody has its owner any more."""
    weakref.finalize(owner, getattr(runtime(), name), handle).atexit = False
    return handle


def why_unavailable(major: int = 0) -> str | None:
    """Return why no GPU can be used here; `major` is the version of CUDA that the driver must have."""
    try:
        driver = call("cudaDriverGetVersion")
        if not driver:
            return "no NVIDIA driver"
        if driver // 1000 < major:
            return f"the NVIDIA driver has CUDA {driver // 1000}, expected {major} or later"
        return None if call("cudaGetDeviceCount") else "no NVIDIA GPU"
    except (CudaError, UsageError) as error:
        return str(error)


def capability() -> str:
    """Return the current GPU's compute capability, "8.9"."""
    device, kinds = call("cudaGetDevice"), runtime().cudaDeviceAttr
    parts = (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
    return ".".join(str(call("cudaDeviceGetAttribute", part, device)) for part in parts)


def free_memory() -> int:
    """Return the bytes that the current GPU has free."""
    return int(call("cudaMemGetInfo"))


class Stream:
    """A stream of our own, given back when nobody works in it any more."""

    def __init__(self) -> None:
        self.handle = _lend(
            self, call("cudaStreamCreateWithFlags", runtime().cudaStreamNonBlocking), "cudaStreamDestroy"
        )

    def __int__(self) -> int:
        return int(self.handle)

    def wait(self) -> None:
        call("cudaStreamSynchronize", self.handle)

    def copy(self, target: int, source: int, size: int, kind: str) -> None:
        """Queue a copy; memory of the host may be read or written until `wait` returns, pinned or not."""
        kinds = runtime().cudaMemcpyKind
        call("cudaMemcpyAsync", target, source, size, getattr(kinds, f"cudaMemcpy{kind}"), self.handle)


class Rows:
    """Rows of an array in memory of the device; which, an index says, as NumPy's would. np.asarray brings them home."""

    def __init__(self, memory: Memory, row: tuple[int, ...], dtype: np.dtype[Any], index: NDArray[np.int64]) -> None:
        self._memory, self._row, self.dtype, self._index = memory, row, dtype, index

    @classmethod
    def put(cls, values: NDArray[Any], stream: Stream) -> Rows:
        values = np.ascontiguousarray(values)
        rows = cls(Memory(values.nbytes, stream), values.shape[1:], values.dtype, np.arange(len(values)))
        rows.fill(values.ctypes.data, "HostToDevice")
        stream.wait()  # for the values, which are the caller's
        return rows

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: np.dtype[Any], stream: Stream) -> Rows:
        """Return rows that hold nothing yet."""
        return cls(Memory(int(np.prod(shape)) * dtype.itemsize, stream), shape[1:], dtype, np.arange(shape[0]))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self._index.shape, *self._row)

    def __getitem__(self, which: Any) -> Rows:
        return Rows(self._memory, self._row, self.dtype, np.asarray(self._index[which]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        values = np.empty(self.shape, self.dtype)
        self.read(values.ctypes.data, "DeviceToHost")
        self._memory.stream.wait()
        return values if dtype is None else values.astype(dtype)

    def read(self, target: int, kind: str = "DeviceToDevice") -> None:
        """Copy these rows, one after the other, to an address."""
        for place, address, size in self._stretches():
            self._memory.stream.copy(target + place, address, size, kind)

    def fill(self, source: int, kind: str = "DeviceToDevice") -> None:
        """Copy these rows from an address."""
        for place, address, size in self._stretches():
            self._memory.stream.copy(address, source + place, size, kind)

    def _stretches(self) -> Iterator[tuple[int, int, int]]:
        """Yield, for rows that lie side by side, their place among these, their address, and bytes."""
        rows, size = self._index.reshape(-1), int(np.prod(self._row)) * self.dtype.itemsize
        first = 0
        for last in (*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)):
            yield first * size, self._memory.address + int(rows[first]) * size, (last - first) * size
            first = last


class Memory:
    """Memory of the device, given back when nobody has it any more."""

    def __init__(self, size: int, stream: Stream) -> None:
        self.size, self.stream = size, stream
        self.address = int(_lend(self, call("cudaMalloc", size), "cudaFree"))  # which waits for what is queued


class Buffer:
    """Memory of the device, and pinned memory of the host once it is filled from there or read into it."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.dtype, self._size = dtype, int(np.prod(shape)) * dtype.itemsize
        self.device = int(_lend(self, call("cudaMalloc", self._size), "cudaFree"))
        self._host: NDArray[np.uint8] | None = None

    def upload(self, values: NDArray[Any] | Rows, stream: Stream) -> None:
        """Copy the values to here; they may change as soon as this returns."""
        if isinstance(values, Rows):
            values.read(self.device)
            return
        stream.wait()  # for an earlier upload that is still queued
        view = self._view(values.shape)
        view[...] = values
        stream.copy(self.device, view.ctypes.data, view.nbytes, "HostToDevice")

    def download(self, shape: tuple[int, ...], stream: Stream) -> NDArray[Any]:
        """Return a view of the pinned memory, to be copied when the stream is done."""
        view = self._view(shape)
        stream.copy(view.ctypes.data, self.device, view.nbytes, "DeviceToHost")
        return view

    def _view(self, shape: tuple[int, ...]) -> NDArray[Any]:
        if self._host is None:
            address = int(_lend(self, call("cudaMallocHost", self._size), "cudaFreeHost"))
            self._host = np.ctypeslib.as_array((ctypes.c_uint8 * self._size).from_address(address))
        return self._host[: int(np.prod(shape)) * self.dtype.itemsize].view(self.dtype).reshape(shape)


class Recording:
    """Work of a stream as a CUDA graph: `with Recording(stream) as graph: …`, then `graph.launch()`."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._graph = stream, None

    def __enter__(self) -> Recording:
        mode = runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self._stream.handle, mode)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            graph = call("cudaStreamEndCapture", self._stream.handle)
        except CudaError:
            if error is None:
                raise
            return  # the error that stopped the capture says why it failed
        try:
            if error is None:
                self._graph = _lend(self, call("cudaGraphInstantiate", graph, 0), "cudaGraphExecDestroy")
        finally:
            call("cudaGraphDestroy", graph)

    def launch(self) -> None:
        call("cudaGraphLaunch", self._graph, self._stream.handle)
