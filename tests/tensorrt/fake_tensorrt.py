"""A TensorRT that is not here. An engine is y = 2 x, or an ONNX file, whose path is then its plan, on ONNX Runtime.

What the real objects free, these free too: work that touches it afterwards fails.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tests.tensorrt.fake_cuda import Cuda

ROWS = ((1, 4), (5, 8))  # the two profiles: fewest and most rows


class TensorRT:
    """The module of either flavour, with one engine: float32 x [rows, 3] in two profiles -> y = 2 x."""

    TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)
    LayerInformationFormat = SimpleNamespace(JSON=1)
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE=1)
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER=1)
    ExecutionContextAllocationStrategy = SimpleNamespace(STATIC=0, USER_MANAGED=2)
    ProfilingVerbosity = SimpleNamespace(NONE=1, DETAILED=2)

    class ILogger:
        ERROR = 1

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.runs, self.opens, self.starts = cuda, 0, True, True
        self.refuses = ""  # the call of a context that says no
        self.unrecordable = ""  # why its work cannot be recorded
        self.host_code = False  # whether the plan brings host code
        self.contexts: list[weakref.ref[Context]] = []
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
                return None
            if self.host_code and not self.runtime.engine_host_code_allowed:
                logger.log(1, "host code is not allowed")
                return None
            self.engine = Engine(self) if plan == b"plan" else OnnxEngine(self, Path(plan.decode()))
            return self.engine

        self.runtime = SimpleNamespace(deserialize_cuda_engine=deserialize, engine_host_code_allowed=False)
        return self.runtime

    def Refitter(self, engine, logger):
        return Refitter(self)

    def OnnxParserRefitter(self, refitter, logger):
        return ParserRefitter(self, refitter)


class Refitter:
    """Reads weights that it does not own."""

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt

    def refit_cuda_engine(self):
        assert self.weights() is not None, "the weights were freed before they were read"
        return not self.trt.refuse("refit_cuda_engine")


class ParserRefitter:
    """Owns the weights of the file that it read."""

    def __init__(self, trt: TensorRT, refitter: Refitter) -> None:
        self.trt, self.weights = trt, np.zeros(3)
        refitter.weights = weakref.ref(self.weights)

    def refit_from_file(self, path):
        self.trt.refitted.append(path)
        return path.endswith(".onnx")


class Unset:
    """TensorRT's Dims of a question that has no answer: of -1 dimensions."""

    def __len__(self):
        return -1

    def __getitem__(self, index):
        raise IndexError(index)


class Engine:
    num_io_tensors, num_optimization_profiles, streamable_weights_size = 2, 2, 100
    device_memory_size_v2 = 64
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

    def get_tensor_shape(self, name):
        return (-1, 3)

    def get_tensor_profile_shape(self, name, profile):
        fewest, most = ROWS[profile]
        return [(fewest, 3), (fewest, 3), (most, 3)]

    def create_runtime_config(self):
        cache = SimpleNamespace(deserialize=self.trt.kernels.append, serialize=lambda: b"kernels")
        settings = SimpleNamespace(
            create_runtime_cache=lambda: cache,
            set_runtime_cache=lambda cache: True,
            set_execution_context_allocation_strategy=lambda strategy: setattr(settings, "strategy", strategy),
            strategy=TensorRT.ExecutionContextAllocationStrategy.STATIC,
        )
        self.trt.settings.append(settings)
        return settings

    def create_execution_context(self, strategy=TensorRT.ExecutionContextAllocationStrategy.STATIC):
        if self.trt.refuse("create_execution_context"):
            return None
        context = self.context()
        strategy = getattr(strategy, "strategy", strategy)  # of settings
        if strategy == TensorRT.ExecutionContextAllocationStrategy.STATIC:
            context.memory = 0  # its own
        self.trt.contexts.append(weakref.ref(context))
        return context

    def context(self):
        return Context(self.trt)


class Context:
    memory: int | None = None  # where its activations are

    def __init__(self, trt: TensorRT) -> None:
        self.trt, self.addresses, self.shape = trt, {}, ()
        self.nvtx_verbosity = TensorRT.ProfilingVerbosity.DETAILED  # that of the build

    def set_optimization_profile_async(self, profile, stream):
        return not self.trt.refuse("set_optimization_profile_async")

    def set_input_shape(self, name, shape):
        self.shape = tuple(shape)
        return not self.trt.refuse("set_input_shape")

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        if self.trt.refuse("set_tensor_address"):
            return False
        self.addresses[name] = address
        return True

    def set_device_memory(self, memory, size):
        assert size >= Engine.device_memory_size_v2
        self.memory = memory

    def execute_async_v3(self, stream):
        """Queue the work; what was recorded holds while this context lives and nothing in it changes."""
        if self.trt.refuse("execute_async_v3"):
            return False
        if self.memory is None:
            self.trt.logger.log(1, "no memory for activations")
            return False
        trt, alive, state, work = self.trt, weakref.ref(self), self.state(), self.work()
        cuda = trt.cuda
        recording = cuda.recorded is not None
        if recording and trt.unrecordable:
            cuda.invalid = True
            trt.logger.log(1, trt.unrecordable)
            return False

        def checked():
            context = alive()
            assert context is not None, "a context was freed before its work was done"
            assert not recording or context.state() == state, "a recorded context was changed"
            assert not context.memory or context.memory in cuda.open, "memory was freed that work is done in"
            trt.runs += 1
            work()

        cuda.later(checked, stream)
        return True

    def state(self):
        return self.shape, self.memory, dict(self.addresses)

    def work(self):
        size = int(np.prod(self.shape))
        x, y = ((ctypes.c_float * size).from_address(self.addresses[name]) for name in ("x", "y"))

        def double():
            for index in range(size):
                y[index] = 2 * x[index]

        return double


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

    def get_tensor_shape(self, name):
        return tuple(-1 if isinstance(size, str) else size for size in {**self.inputs, **self.outputs}[name].shape)

    def get_tensor_profile_shape(self, name, profile):
        """A shape without free dimensions is in no profile."""

        def shape(rows):
            sizes = {"groups": profile + 1}
            return tuple(sizes.get(size, rows) if isinstance(size, str) else size for size in self.inputs[name].shape)

        return [shape(1), shape(1), shape(self.most)] if -1 in self.get_tensor_shape(name) else [Unset()] * 3

    def context(self):
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
            for input_name, shape in self.shapes.items()
            for symbol, size in zip(self.engine.inputs[input_name].shape, shape, strict=True)
        }
        return tuple(known.get(size, size) for size in self.engine.outputs[name].shape)

    def state(self):
        return dict(self.shapes), self.memory, dict(self.addresses)

    def work(self):
        def array(name, shape):
            dtype = np.int64 if self.engine.get_tensor_dtype(name).name == "INT64" else np.float32
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype).reshape(shape)

        inputs = {name: array(name, self.shapes[name]) for name in self.engine.inputs}
        outputs = {name: array(name, self.get_tensor_shape(name)) for name in self.engine.outputs}

        session = self.engine.session

        def run():
            made = session.run(list(outputs), inputs)
            for name, values in zip(outputs, made, strict=True):
                outputs[name][...] = values

        return run
