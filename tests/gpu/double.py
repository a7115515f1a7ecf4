"""A TensorRT whose engines are two small kernels: what runs engines is then tested on any driver, a real one too.

`step` mixes gain · x + shift of one or two groups by guidance; `update` is a linear solver's step. On a GPU a kernel
goes to the stream that is given; elsewhere the fake driver of tests/tensorrt queues the same arithmetic. It is
elementwise, in float32 and without contraction, so NumPy has the same bits.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.tensorrt import fake_tensorrt
from tests.tensorrt.fake_cuda import Cuda

WIDTH, MOST = 6, 3  # numbers a state has, and samples that an engine takes
THREADS = 128
KERNELS = r"""
extern "C" __global__ void step(float* y, const float* x, const float* conditioning, const float* guidance,
                                const long long* labels, int groups, int rows, int width) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * width) return;
    int row = i / width;
    const float* own = conditioning + 2 * row;
    const float* away = conditioning + 2 * ((groups - 1) * rows + row);
    float first = own[0] * x[i] + own[1];
    float last = away[0] * x[i] + away[1];
    y[i] = (last + guidance[row] * (first - last)) + (float)labels[row];
}
extern "C" __global__ void update(float* kept, float* next, const float* x, const float* prediction,
                                  const float* previous, const float* m, int size) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    kept[i] = (m[0] * x[i] + m[1] * prediction[i]) + m[2] * previous[i];
    next[i] = (m[3] * x[i] + m[4] * prediction[i]) + m[5] * previous[i];
}
"""
Arrays = Mapping[str, NDArray[Any]]
Made = dict[str, NDArray[Any]]


def step(inputs: Arrays) -> Made:
    x, conditioning = inputs["latents"], inputs["conditioning"]  # (B, W), (G, B, 2)
    first, last = (part[:, :1] * x + part[:, 1:] for part in (conditioning[0], conditioning[-1]))
    mixed = last + inputs["guidance"][:, None] * (first - last)
    return {"prediction": mixed + inputs["labels"][:, None].astype(np.float32)}


def update(inputs: Arrays) -> Made:
    states = [inputs[name] for name in ("latents", "prediction", "previous")]
    rows = [(m[0] * states[0] + m[1] * states[1]) + m[2] * states[2] for m in inputs["coefficients"]]
    return dict(zip(("kept", "next"), rows, strict=True))


class Network(NamedTuple):
    reads: Mapping[str, tuple[Any, ...]]  # shapes, of numbers and of the words that profiles fill
    gives: Mapping[str, tuple[Any, ...]]
    profiles: tuple[int, ...]  # groups
    compute: Callable[[Arrays], Made]


STATE = ("rows", WIDTH)
NETWORKS = {
    "step": Network(
        {"latents": STATE, "conditioning": ("groups", "rows", 2), "guidance": ("rows",), "labels": ("rows",)},
        {"prediction": STATE},
        (1, 2),
        step,
    ),
    "update": Network(
        {"latents": STATE, "prediction": STATE, "previous": STATE, "coefficients": (2, 3)},
        {"kept": STATE, "next": STATE},
        (1,),
        update,
    ),
}


class TensorRT(fake_tensorrt.TensorRT):
    """The module; a plan is the name of a network."""

    def __init__(self, driver: Cuda | None) -> None:
        super().__init__(driver)  # type: ignore[arg-type]  # None: the kernels are CUDA's own
        self.enqueued = 0

    def Runtime(self, logger: Any) -> SimpleNamespace:
        runtime = super().Runtime(logger)
        runtime.deserialize_cuda_engine = lambda plan: Engine(self, NETWORKS[bytes(plan).decode()])
        return runtime


class Engine(fake_tensorrt.Engine):
    streamable_weights_size = 0

    def __init__(self, trt: TensorRT, network: Network) -> None:
        super().__init__(trt)
        self.network = network
        self.names = [*network.gives, *network.reads]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(network.profiles)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> int:
        return int(name in self.network.gives)

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="INT64" if name == "labels" else "FLOAT")

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [_filled(self.network.reads[name], self.network.profiles[profile], rows) for rows in (1, MOST, MOST)]

    def create_execution_context(self, settings: Any = None) -> Context:
        return Context(self)


class Context(fake_tensorrt.Context):
    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.trt)
        self.engine, self.shapes = engine, {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        known = self.shapes.get(name)
        return known or _filled(self.engine.network.gives[name], 1, self.shapes["latents"][0])

    def execute_async_v3(self, stream: int) -> bool:
        self.trt.enqueued += 1
        shapes = {name: self.get_tensor_shape(name) for name in self.engine.names}
        if self.trt.cuda is None:
            _launch(self.engine.network.compute.__name__, shapes, self.addresses, stream)
            return True
        arrays = {name: _array(self.addresses[name], shape, name == "labels") for name, shape in shapes.items()}

        def work() -> None:
            for name, values in self.engine.network.compute(arrays).items():
                arrays[name][...] = values

        self.trt.cuda.later(work, stream)
        return True


def _launch(name: str, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int], stream: int) -> None:
    import cupy

    network, size = NETWORKS[name], int(np.prod(shapes["latents"]))
    sizes = [shapes["conditioning"][0], *shapes["latents"]] if name == "step" else [size]
    pointers = [np.uint64(addresses[tensor]) for tensor in (*network.gives, *network.reads)]
    with cupy.cuda.ExternalStream(stream):
        _kernel(name)((-(-size // THREADS),), (THREADS,), (*pointers, *map(np.int32, sizes)))


@functools.cache
def _kernel(name: str) -> Any:
    import cupy

    return cupy.RawModule(code=KERNELS, options=("--fmad=false",)).get_function(name)


def _filled(shape: tuple[Any, ...], groups: int, rows: int) -> tuple[int, ...]:
    words = {"groups": groups, "rows": rows}
    return tuple(words.get(size, size) for size in shape)


def _array(address: int, shape: tuple[int, ...], integers: bool) -> NDArray[Any]:
    dtype = np.dtype(np.int64 if integers else np.float32)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)
