"""The provider's engine: its options, the order in which its parts end, what it opens and what it refuses."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from dit_runtime import EngineError, Pipeline, UsageError
from dit_runtime.backends import Options, ort, ort_cuda
from dit_runtime.errors import BundleError
from tests.runtime.ort_cuda import fakes
from tests.runtime.ort_cuda.fakes import Runtime
from tests.tamper import edit, seal


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

    for module, name in ((ort_cuda, "Stream"), (ort_cuda, "Buffer"), (fakes, "Session"), (fakes, "Binding")):
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
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
