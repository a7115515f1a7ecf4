"""ONNX Runtime's CUDA provider without a GPU: the real CPU provider stands in, and its memory is a fake CUDA's."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from dit_runtime import EngineError, Pipeline, Request, UsageError, verify
from dit_runtime.backends import Options, cuda, ort, ort_cuda
from dit_runtime.conditions.memo import Memo
from dit_runtime.errors import BundleError, Stopped
from dit_runtime.sampling.noise import Noise
from tests.runtime.test_loops import Host
from tests.tamper import edit, seal
from tests.tensorrt.fakes import Cuda

LABELS = [1, 3, 0, 4, 3]  # more than the three rows that an engine takes
OPTIONS = {"steps": 25, "guidance": 3.0, "seed": 2, "output": "latents"}
UP, HOME = 1, 2
FREE_RUN = 1e-4  # as the tests of the loop of matrices


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


@pytest.fixture
def device(monkeypatch) -> Device:
    fake = Device()
    monkeypatch.setattr(cuda, "runtime", lambda: fake)
    return fake


@pytest.fixture
def runtime(device, monkeypatch) -> Runtime:
    fake = Runtime(device)
    monkeypatch.setattr(ort, "load", lambda: fake)
    return fake


@pytest.fixture
def on_gpu(runtime, handmade):
    """Opens a kind's bundle on the provider; all are closed at the end."""
    pipes: list[Pipeline] = []

    def open_(kind: str = "labels", **options: object) -> Pipeline:
        pipes.append(Pipeline.load(handmade(kind), **{"threads": 1, "provider": "cuda"} | options))
        return pipes[-1]

    yield open_
    for pipe in pipes:
        pipe.close()


@pytest.fixture
def stays(handmade, monkeypatch):
    """Opens a kind's bundle on engines whose arrays are NumPy's: the same loop, without a device."""

    @contextmanager
    def open_(kind: str = "labels") -> Iterator[Pipeline]:
        with monkeypatch.context() as patch:
            patch.setattr(ort, "OrtEngine", Host)
            with Pipeline.load(handmade(kind), threads=1) as pipe:
                yield pipe

    return open_


@pytest.fixture
def engine(runtime, handmade):
    """Opens a stage of the bundle that takes labels."""

    def open_(stage: str = "denoiser", **options: object) -> ort_cuda.OrtCudaEngine:
        folder = handmade("labels")
        return ort.open([folder / f"{stage}.onnx"], Options(**{"threads": 1, "provider": "cuda"} | options))

    return open_


CONDITIONS = {
    "labels": {"labels": LABELS},
    "captioned": {
        "condition": {"captions": Noise(1).normal((5, 5, 3))},
        "negative": {"captions": Noise(1).normal((1, 5, 3))},
    },
    "wave": {"condition": {"words": Noise(1).normal((5, 3, 4)), "pooled": Noise(2).normal((5, 5))}},
}


def request(kind: str, **options: object) -> dict:
    return OPTIONS | CONDITIONS[kind] | options


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("window", [None, 1], ids=["all steps", "a step"])
def test_the_bits_of_the_host(on_gpu, stays, monkeypatch, kind, window) -> None:
    """25 steps of five samples in parts of three and two, each step looked at; memos of all steps and of one."""
    if window is not None:
        monkeypatch.setitem(Memo.__init__.__kwdefaults__, "budget", window)
    steps: dict[str, list[np.ndarray]] = {"host": [], "gpu": []}
    with stays(kind) as pipe:
        pipe.sample(**request(kind), on_step=lambda *seen: steps["host"].append(seen[2]))
    on_gpu(kind).sample(**request(kind), on_step=lambda *seen: steps["gpu"].append(seen[2]))
    assert len(steps["host"]) == len(steps["gpu"]) > 24
    for mine, theirs in zip(steps["gpu"], steps["host"], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_the_pictures_of_the_cpu(opened, on_gpu) -> None:
    options = request("labels", output="images")
    differences = np.abs(on_gpu().sample(**options).astype(int) - opened().sample(**options))
    assert differences.max() <= 1
    latents = [pipe.sample(**request("labels")) for pipe in (on_gpu(), opened())]
    assert 0 < np.linalg.norm(latents[0] - latents[1]) <= FREE_RUN * np.linalg.norm(latents[1])


def test_a_built_bundle(shared_embedders, runtime) -> None:
    """Attention in the denoiser, the provider's own form of the decoder: verified against PyTorch's reference run."""
    with Pipeline.load(shared_embedders.bundle, threads=1, provider="cuda") as pipe:
        figures = verify.verify(pipe)
    assert all(figure.passed for figure in figures) and {"denoiser", "run"} <= {figure.stage for figure in figures}
    opened = {session.path.name for session in runtime.sessions}
    assert {"denoiser.onnx", "decoder.onnxruntime-cuda.onnx"} <= opened


def test_the_loop_of_the_solver(opened, on_gpu) -> None:
    """A solver that draws noise works on the host; the engine is the same."""
    options = request("labels", solver="ddim", eta=0.5)
    np.testing.assert_array_equal(on_gpu().sample(**options), opened().sample(**options))


@pytest.mark.parametrize("kind", CONDITIONS)
def test_only_the_state_comes_home(on_gpu, device, kind) -> None:
    """The tables that are made before the loop do not: their engines write them where they are read."""
    pipe = on_gpu(kind)
    pipe.sample(**request(kind))
    state = 4 * math.prod(pipe.manifest.state.shape)
    assert {size for way, size in device.copied if way == HOME} == {3 * state, 2 * state}


def test_nothing_crosses_in_a_step(on_gpu, device) -> None:
    pipe, crossed = on_gpu(), []
    for steps in (2, 10):
        device.copied.clear()
        pipe.sample(LABELS, **OPTIONS | {"steps": steps})
        before = {4 * rows for rows in range(1, 4)} | {8 * rows for rows in range(1, 4)}  # what the conditioner reads
        ignored = before | {4 * steps * 2 * 3}  # and the matrices
        crossed.append({key: n for key, n in device.copied.items() if key[0] in (UP, HOME) and key[1] not in ignored})
    assert crossed[0] == crossed[1]
    device.copied.clear()
    pipe.sample(LABELS, **OPTIONS | {"steps": 10}, on_step=lambda *_: None)
    assert device.copied[HOME, 384] == device.copied[HOME, 256] == 10 + 1


def test_a_graph_a_shape(on_gpu, runtime) -> None:
    """A shape runs once, is recorded in its second run, and replayed from then on."""
    pipe = on_gpu()
    pipe.sample(LABELS, **OPTIONS)
    session = pipe.engines.opened["denoiser"]._session
    assert session.runs == ["-1", "-1"] + 24 * ["1", "2"] and sorted(session.recorded) == ["1", "2"]
    pipe.sample(LABELS, **OPTIONS | {"guidance": 1.0})  # one group instead of two
    pipe.sample(LABELS, **OPTIONS)
    assert sorted(session.recorded) == ["1", "2", "3", "4"] and session.runs.count("-1") == 4
    assert len({session.options["user_compute_stream"] for session in runtime.sessions}) == 1  # all in one order


def test_only_the_last_shapes_keep_their_memory(on_gpu, device, monkeypatch) -> None:
    monkeypatch.setattr(ort_cuda, "SHAPES", 2)
    pipe = on_gpu()
    session = pipe.engines.opened["denoiser"]._session
    expected = pipe.sample(LABELS, **OPTIONS)  # parts of three and of two
    gc.collect()
    held = len(device.open)
    pipe.sample(LABELS[:1], **OPTIONS)
    assert sorted(session.recorded) == ["2", "3"]
    np.testing.assert_array_equal(pipe.sample(LABELS, **OPTIONS), expected)
    assert sorted(session.recorded) == ["4", "5"]
    gc.collect()
    assert len(device.open) == held


def test_without_graphs_where_the_provider_cannot_record(on_gpu, stays, runtime, capsys) -> None:
    with stays() as pipe:
        expected = pipe.sample(LABELS, **OPTIONS)
    runtime.records = False
    np.testing.assert_array_equal(on_gpu().sample(LABELS, **OPTIONS), expected)
    assert "it runs without: operation not permitted when stream is capturing" in capsys.readouterr().err
    runtime.graphs = False
    np.testing.assert_array_equal(on_gpu().sample(LABELS, **OPTIONS), expected)
    said = capsys.readouterr().err
    assert "it runs without: This session cannot use the graph capture feature as requested by the user\n" in said
    assert runtime.sessions[-1].options["enable_cuda_graph"] == "0" and set(runtime.sessions[-1].runs) == {"-1"}


@pytest.mark.parametrize("stage", ["conditioner", "denoiser", "update"])
def test_a_step_that_failed_can_be_tried_again(on_gpu, monkeypatch, stage) -> None:
    """Also in the middle of a table, and where the first part of a batch has gone the step already."""
    pipe = on_gpu()
    expected = pipe.sample(LABELS, **OPTIONS)
    run, session = pipe.run(Request(LABELS, **OPTIONS)), pipe.engines.opened[stage]._session
    work, calls = session.run_with_iobinding, []

    def failing(binding, settings) -> None:
        calls.append(1)
        if len(calls) in (4, 5):
            raise RuntimeError("out of memory")
        work(binding, settings)

    monkeypatch.setattr(session, "run_with_iobinding", failing)
    failures = 0
    while True:
        try:
            more = run.step()
        except EngineError as error:
            assert "out of memory" in str(error)
            failures += 1
        else:
            if not more:
                break
    assert failures == 2
    np.testing.assert_array_equal(run.result(), expected)


def test_a_run_that_is_cancelled(on_gpu, device) -> None:
    pipe = on_gpu()
    expected = pipe.sample(LABELS, **OPTIONS)
    gc.collect()
    before, run = len(device.open), pipe.run(Request(LABELS, **OPTIONS))
    for _ in range(3):
        run.step()
    assert np.isfinite(run.state).all() and len(device.open) > before
    run.cancel()
    with pytest.raises(Stopped):
        run.step()
    del run
    gc.collect()
    assert len(device.open) == before
    np.testing.assert_array_equal(pipe.sample(LABELS, **OPTIONS), expected)


def test_everything_is_given_back(on_gpu, device) -> None:
    pipe, after = on_gpu(), []
    for _ in range(2):
        pipe.sample(LABELS, **OPTIONS | {"output": "images"})
        gc.collect()
        after.append(len(device.open))
    assert after[0] == after[1]
    pipe.close()
    gc.collect()
    assert device.open == {}
    device.room = 5
    with pytest.raises(EngineError, match="cudaMalloc: cudaErrorMemoryAllocation"):
        on_gpu().sample(LABELS, **OPTIONS)


def test_low_memory_keeps_nothing(on_gpu, opened, device) -> None:
    pipe = on_gpu(low_memory=True)
    np.testing.assert_array_equal(pipe.sample(LABELS, **OPTIONS), opened(low_memory=True).sample(LABELS, **OPTIONS))
    assert [*pipe.engines.opened] == ["denoiser"]
    pipe.close()
    gc.collect()
    assert device.open == {}


def update_shapes(runtime: Runtime) -> dict[str, list[int]]:
    """Return the shapes of the inputs of the session that was opened first, for two rows."""
    tensors = runtime.sessions[0].get_inputs()
    return {tensor.name: [2 if isinstance(size, str) else size for size in tensor.shape] for tensor in tensors}


def test_any_gpu(engine, runtime, device) -> None:
    with pytest.raises(UsageError, match="provider 'cuda:1' cannot run here: cudaSetDevice: cudaErrorInvalidDevice"):
        engine(provider="cuda:1")
    device.devices = 2
    made = engine("update", provider="cuda:1")
    assert device.current == 0 and runtime.sessions[0].options["device_id"] == "1"
    arrays = {name: np.zeros(shape, np.float32) for name, shape in update_shapes(runtime).items()}
    made.run(arrays | {"latents": made.put(arrays["latents"])})
    made.empty((2, 3), np.dtype(np.float32))
    made.close()
    assert device.current == 0 and device.used == {1}  # the caller's stays current
    for odd in ("cuda:", "cuda:x", "cuda:-1", "CUDA", "tpu"):
        with pytest.raises(UsageError, match="known: cpu, cuda, cuda:N"):
            engine(provider=odd)


@pytest.fixture
def ends(runtime, monkeypatch) -> list[str]:
    """Everything that has gone, in its order."""
    gone: list[str] = []

    def noted(kind, make):
        def made(*arguments):
            thing = make(*arguments)
            weakref.finalize(thing, gone.append, kind)
            return thing

        return made

    for module, name in ((ort_cuda, "Stream"), (ort_cuda, "Buffer"), (sys.modules[__name__], "Session")):
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    monkeypatch.setattr(sys.modules[__name__], "Binding", noted("Binding", Binding))
    return gone


@pytest.mark.parametrize("closed", [True, False])
def test_the_stream_goes_last(engine, runtime, ends, closed) -> None:
    made = engine("update")
    made.run({name: np.zeros(shape, np.float32) for name, shape in update_shapes(runtime).items()})
    runtime.sessions.clear()
    if closed:
        made.close()
        assert ends[:2] == ["Binding", "Session"]
    del made
    gc.collect()
    assert ends.index("Session") < ends.index("Buffer") and ends[-1] == "Stream"


def test_the_stream_of_an_engine_that_does_not_open_goes_last(engine, runtime, ends) -> None:
    runtime.on_cpu = ("MatMul",)
    with pytest.raises(UsageError) as refused:
        engine()
    runtime.sessions.clear()
    assert ends == []
    del refused
    gc.collect()
    assert ends == ["Session", "Stream"]


def test_fp32_is_fp32(engine, runtime) -> None:
    """ONNX Runtime would take TF32, which misses fp32's tolerance, and try every convolution at every shape."""
    engine()
    options = runtime.sessions[0].options
    assert options["use_tf32"] == "0" and options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert options["cudnn_conv_use_max_workspace"] == "1" and options["enable_cuda_graph"] == "1"
    assert options["user_compute_stream"].isdecimal() and runtime.preloads == 1


def test_shapes_that_do_not_fit(engine, runtime) -> None:
    made = engine("update")
    arrays = {name: np.zeros(shape, np.float32) for name, shape in update_shapes(runtime).items()}
    arrays["previous"] = arrays["previous"][:1]
    with pytest.raises(UsageError, match=r"has shape \[\d, .*expected \['batch'"):
        made.run(arrays)
    arrays["previous"] = np.zeros_like(arrays["prediction"])
    with pytest.raises(EngineError, match=r"next has shape \[2, .* expected \[1, "):
        made.run(arrays, {"next": made.put(arrays["prediction"][:1])})


def test_what_the_cpu_would_compute_is_refused(engine, runtime) -> None:
    runtime.on_cpu = ("MatMul", "Gather")
    with pytest.raises(UsageError, match=r"denoiser.onnx: ONNX Runtime has no CUDA kernel for 2 MatMul; use provider"):
        engine()
    runtime.on_cpu = ("Gather", "Reshape")  # of shapes, which it computes on the CPU
    engine()


def test_precisions_without_kernels(engine) -> None:
    with pytest.raises(UsageError, match="int8 has no kernels in ONNX Runtime's CUDA provider; build fp16"):
        engine(precision="int8")
    with pytest.raises(UsageError, match="bf16 has no kernels in ONNX Runtime's CPU provider; use provider cuda"):
        engine(precision="bf16", provider=None)


def test_why_the_provider_does_not_start(engine, runtime, device, tmp_path) -> None:
    """Never on the CPU instead; the message is the loader's own."""
    runtime.starts = False
    runtime.__file__ = str(tmp_path / "__init__.py")
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / ort_cuda.LIBRARY).write_bytes(b"no library")
    with pytest.raises(UsageError, match=r"provider 'cuda' did not start here: .*(file too short|invalid ELF header)"):
        engine()
    device.devices = 0
    with pytest.raises(UsageError, match="provider 'cuda' cannot run here: no NVIDIA GPU"):
        engine()
    runtime.available = ["CPUExecutionProvider"]
    with pytest.raises(UsageError, match=r"is not in this onnxruntime: .*pip install 'dit-runtime\[onnxruntime-gpu\]'"):
        engine()


def test_a_file_that_is_no_graph(runtime, tmp_path) -> None:
    (tmp_path / "denoiser.onnx").write_bytes(b"\x00\x01 no graph")
    with pytest.raises(BundleError, match=r"denoiser.onnx: ONNX Runtime does not open it"):
        ort.open([tmp_path / "denoiser.onnx"], Options(provider="cuda"))


def test_libraries_of_python_packages(monkeypatch, tmp_path, capsys) -> None:
    """In any folder of the package `nvidia`, each after what it needs; what ONNX Runtime prints stays unprinted."""
    loaded = ["libcublasLt.so.13"]

    def load(path: str) -> None:
        if path != Path(path).name:
            loaded.append(Path(path).name)
        elif path not in loaded:
            raise OSError(f"{path}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    for place in (
        "first/cudnn/lib/libcudnn.so.9",
        *(f"second/cu13/lib/lib{name}.so.13" for name in ("cublas", "cublasLt")),
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    nvidia = SimpleNamespace(__path__=[str(tmp_path / "first"), str(tmp_path / "second")])
    monkeypatch.setitem(sys.modules, "nvidia", nvidia)
    ort_cuda.preload(SimpleNamespace(preload_dlls=lambda: print("Failed to load libcublas.so.13")))
    assert loaded == ["libcublasLt.so.13", "libcublas.so.13", "libcudnn.so.9"]
    assert capsys.readouterr().out == ""


@pytest.fixture
def distributions(monkeypatch, tmp_path):
    """Which packages claim which folder, and which folder `import onnxruntime` takes."""

    def say(taken: str, **claims: str) -> None:
        def distribution(name: str) -> SimpleNamespace:
            key = name.replace("-", "_")
            if key not in claims:
                raise metadata.PackageNotFoundError(name)
            return SimpleNamespace(version=f"1 of {name}", locate_file=lambda part: tmp_path / claims[key] / part)

        spec = SimpleNamespace(origin=str(tmp_path / taken / "onnxruntime" / "__init__.py") if taken else None)
        monkeypatch.setattr(metadata, "distribution", distribution)
        monkeypatch.setattr(util, "find_spec", lambda name: spec)

    return say


def test_the_version_is_that_of_what_is_imported(distributions) -> None:
    distributions("image", onnxruntime="venv", onnxruntime_gpu="image")
    assert ort.version() == "1 of onnxruntime-gpu"
    distributions("venv", onnxruntime="venv", onnxruntime_gpu="image")
    assert ort.version() == "1 of onnxruntime"
    distributions("source", onnxruntime="venv")
    assert ort.version() == onnxruntime.__version__
    distributions("", onnxruntime="venv")  # an empty folder
    assert ort.version() is None
    distributions("venv", onnxruntime="venv", onnxruntime_gpu="venv")
    with pytest.raises(UsageError, match=r"are both installed in .*: pip uninstall both, install one"):
        ort.version()


def test_a_form_of_its_own_is_what_the_provider_opens(bundle, runtime) -> None:
    """The portable form where there is none: it has Attention, for which CUDA has a kernel."""
    opened: list[str] = []
    make = runtime.InferenceSession
    runtime.InferenceSession = lambda path, *rest, **options: opened.append(path.name) or make(path, *rest, **options)

    def change(table: dict) -> None:
        for stage in table["stages"]:
            for form in ("onnxruntime", ort.CUDA_FORM):
                if (stage["name"], form) != ("denoiser", ort.CUDA_FORM):
                    file = f"{stage['name']}.{form}.onnx"
                    (bundle / file).write_bytes((bundle / stage["onnx"]).read_bytes())
                    table["files"][file] = {}
                    stage["engines"][form] = [file, stage["onnx"] + ".data"]

    edit(bundle, change)
    seal(bundle)
    with Pipeline.load(bundle, provider="cuda"):
        assert opened == ["conditioner.onnxruntime-cuda.onnx", "denoiser.onnx", "decoder.onnxruntime-cuda.onnx"]
    (bundle / "denoiser.onnx").write_bytes(b"damaged")
    with pytest.raises(BundleError, match=r"denoiser\.onnx has 7 bytes"):
        Pipeline.load(bundle, provider="cuda")
