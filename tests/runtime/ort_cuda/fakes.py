"""ONNX Runtime's CUDA provider without a GPU: the real CPU provider stands in, and its memory is a fake CUDA's."""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace

import onnxruntime

from dit_runtime.backends import ort_cuda
from tests.tensorrt.fake_cuda import Cuda


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidDevice = 101


class Device(Cuda):
    """Records which GPU is current, and which ones memory and streams were made on."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.current = 0
        self.used: set[int] = set()

    def cudaGetDevice(self):
        return Status.cudaSuccess, self.current

    def cudaSetDevice(self, number):
        if number >= self.devices:
            return (Status.cudaErrorInvalidDevice,)
        self.current = number
        return (Status.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags):
        self.used.add(self.current)
        return super().cudaStreamCreateWithFlags(flags)

    def cudaMalloc(self, size):
        self.used.add(self.current)
        return super().cudaMalloc(size)


class Binding:
    """Takes addresses on the GPU; the CPU provider reads them as its own."""

    def __init__(self, real, number: int) -> None:
        self.real, self.number, self.addresses = real, number, {}

    def bind_input(self, name, *where) -> None:
        self._bind(self.real.bind_input, name, *where)

    def bind_output(self, name, *where) -> None:
        self._bind(self.real.bind_output, name, *where)

    def _bind(self, bind, name, kind, number, dtype, shape, address) -> None:
        assert (kind, number) == ("cuda", self.number) and name not in self.addresses
        self.addresses[name] = address, tuple(shape)
        bind(name, "cpu", 0, dtype, shape, address)


class Session:
    def __init__(self, runtime, path, settings, providers) -> None:
        ((name, self.options),) = providers
        assert name == ort_cuda.PROVIDER
        self.runtime, self.path = runtime, path
        runtime.cuda.cudaSetDevice(int(self.options["device_id"]))  # and leaves it so, as ONNX Runtime does
        self.real = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs
        self.recorded: dict[str, dict] = {}
        self.runs: list[str] = []  # graph ids

    def get_providers(self):
        return [ort_cuda.PROVIDER, "CPUExecutionProvider"] if self.runtime.starts else ["CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self):
        """Say of everything that the GPU has it, but for some ops."""
        parts = []
        for part in self.real.get_provider_graph_assignment_info():
            left = [node for node in part.get_nodes() if node.op_type in self.runtime.on_cpu]
            taken = [node for node in part.get_nodes() if node.op_type not in self.runtime.on_cpu]
            parts.append(SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda left=left: left))
            parts.append(SimpleNamespace(ep_name=ort_cuda.PROVIDER, get_nodes=lambda taken=taken: taken))
        return parts

    def io_binding(self):
        return Binding(self.real.io_binding(), int(self.options["device_id"]))

    def release_captured_graph(self, number: int) -> None:
        del self.recorded[str(number)]

    def run_with_iobinding(self, binding, settings) -> None:
        assert settings.get_run_config_entry(ort_cuda.ASYNCHRONOUS) == "1"
        number = settings.get_run_config_entry(ort_cuda.GRAPH)
        if number != ort_cuda.NO_GRAPH:
            assert self.options["enable_cuda_graph"] == "1"
            if number not in self.recorded and not self.runtime.records:
                raise RuntimeError("operation not permitted when stream is capturing")
            # What was recorded works on these addresses, whatever is bound later.
            assert self.recorded.setdefault(number, binding.addresses) == binding.addresses
        self.runs.append(number)
        stream = int(self.options["user_compute_stream"])
        self.runtime.cuda.later(lambda: self.real.run_with_iobinding(binding.real), stream)


class Runtime:
    """onnxruntime-gpu, as far as it is used."""

    def __init__(self, device: Device) -> None:
        self.cuda, self.starts, self.records, self.on_cpu = device, True, True, ()
        self.graphs = True  # whether a session may be asked to record
        self.available = [ort_cuda.PROVIDER, "CPUExecutionProvider"]
        self.sessions: list[Session] = []
        self.preloads = 0
        self.RunOptions, self.SessionOptions = onnxruntime.RunOptions, onnxruntime.SessionOptions

    def get_available_providers(self):
        return self.available

    def preload_dlls(self) -> None:
        self.preloads += 1

    def InferenceSession(self, path, settings, providers, enable_fallback=1):
        if providers == ["CPUExecutionProvider"]:
            return onnxruntime.InferenceSession(path, settings, providers=providers)
        assert not enable_fallback
        if not self.graphs and providers[0][1]["enable_cuda_graph"] == "1":
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user\nand more")
        self.sessions.append(Session(self, path, settings, providers))
        return self.sessions[-1]
