"""Every backend behind the one protocol, on the same bundle; and what low memory keeps open."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import helper, numpy_helper

from dit_runtime import Pipeline, UsageError, backends, verify
from dit_runtime.backends import Options
from dit_runtime.backends.trt import Flavour
from dit_runtime.bundle import manifest
from dit_runtime.cli import main

BACKENDS = ["openvino", "onnxruntime"]  # those of every CPU


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dit-run"


def on(folder: Path, backend: str) -> Path:
    """The same bundle, run by another backend."""
    contract = manifest.read(folder)
    stages = tuple(replace(stage, backend=backend) for stage in contract.stages)
    manifest.write(folder, replace(contract, stages=stages))
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_picture_whatever_the_backend(handmade, bundle, backend) -> None:
    with Pipeline.load(handmade("labels")) as pipe:
        expected = pipe.sample([2, 3, 1], steps=4, seed=[1, 2, 3])
    with Pipeline.load(on(bundle, backend), threads=1) as pipe:
        for labels, seeds in (([2, 3, 1], [1, 2, 3]), ([3], [2])):
            pictures = pipe.sample(labels, steps=4, seed=seeds).astype(int)
            for picture, seed in zip(pictures, seeds, strict=True):
                difference = np.abs(picture - expected[seed - 1])
                assert difference.max() <= 1 and (difference > 0).mean() < 1e-2  # fp32, rounded to 256 levels
        alone = pipe.sample([3], steps=4, seed=2, guidance=1.0)
        assert np.abs(alone.astype(int) - expected[1]).max() > 10  # another question has another answer


@pytest.mark.parametrize("kind", ["captioned", "wave", "video", "free"])
def test_every_kind_on_openvino(copied, kind) -> None:
    """Verified against the reference: any rank, any conditions, the groups at once where threads allow."""
    with Pipeline.load(on(copied(kind), "openvino"), threads=2) as pipe:
        figures = verify.verify(pipe)
    assert all(figure.passed for figure in figures) and {"denoiser", "run"} <= {figure.stage for figure in figures}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_form_of_its_own_is_what_the_backend_opens(handmade, backend) -> None:
    step = manifest.read(handmade("labels")).step
    engines = {backend: (f"denoiser.{backend}.onnx", "denoiser.onnx.data")}
    assert replace(step, backend=backend, engines=engines).files == engines[backend]
    assert replace(step, engines=engines).files == (step.files if backend != "onnxruntime" else engines[backend])


@pytest.mark.parametrize(
    "flags, exact", [("sse2 avx2 avx512f", True), ("sse2 avx2 avx_vnni", False), ("asimd i8mm", False), (None, True)]
)
def test_products_do_not_saturate_where_there_is_no_vnni(bundle, tmp_path, monkeypatch, flags, exact) -> None:
    """ONNX Runtime does as it is asked on every x86 CPU, at 0.4 of the speed, so that it is asked is what counts."""
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}")
    monkeypatch.setattr(backends.backend("onnxruntime"), "CPU", tmp_path / "cpuinfo")
    step = manifest.read(on(bundle, "onnxruntime")).step
    engine = backends.backend("onnxruntime").open([bundle / name for name in step.files], Options())
    settings = engine._session.get_session_options()
    if exact:
        assert settings.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError, match="x64quantprecision"):
            settings.get_session_config_entry("session.x64quantprecision")


def asked(pipe: Pipeline, batches: Sequence[int]) -> list[np.ndarray]:
    """Return what the step stage answers to the first samples of one set, for each batch with guidance and without."""
    noise = np.random.default_rng(3).normal(size=(3, *pipe.manifest.state.shape))
    labels, weights, predictions = np.array([2, 0, 4]), np.array([4, 1.5, 7], np.float32), []
    for batch in batches:
        for negative in ({"labels": np.array([5])}, None):
            inputs = pipe.engines.inputs(np.array([300.0]), {"labels": labels[:batch]}, negative, weights[:batch])
            predictions.append(pipe.engines.denoise(noise[:batch], inputs, 0)[0])
    return predictions


@pytest.mark.parametrize("threads, streams", [(1, 1), (2, 2), (3, 1)])
def test_a_row_on_openvino_is_the_same_in_any_batch(bundle, tmp_path, monkeypatch, threads, streams) -> None:
    """Two rows run at once where each can have half of the threads, of cores that are alike. A row's bits depend
    neither on its batch nor on the threads, nor on what ran before."""
    module, settings = backends.backend("openvino"), []
    compile_ = module.OvEngine._compile
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(module, "UNLIKE", tmp_path / "cpu_atom")
    monkeypatch.setattr(
        module.OvEngine, "_compile", lambda self, *model, **how: settings.append(how) or compile_(self, *model, **how)
    )
    on(bundle, "openvino")
    with Pipeline.load(bundle, threads=1) as pipe:
        alone, alone_unguided = asked(pipe, [1])
    settings.clear()
    with Pipeline.load(bundle, threads=threads) as pipe:
        guided, unguided, *_, again, again_unguided = asked(pipe, [3, 2, 1])
    assert max(how.get("NUM_STREAMS", 1) for how in settings) == streams
    for one, whole in ((again, guided), (alone, guided), (again_unguided, unguided), (alone_unguided, unguided)):
        np.testing.assert_array_equal(one, whole[:1])
    assert np.abs(guided - unguided).max() > 1e-3


def test_rows_do_not_share_the_threads_of_unlike_cores(bundle, tmp_path, monkeypatch) -> None:
    module = backends.backend("openvino")
    monkeypatch.setattr(module, "UNLIKE", tmp_path)  # which is there
    step = manifest.read(on(bundle, "openvino")).step
    with Pipeline.load(bundle, threads=2) as pipe:
        assert pipe.engines.open(step)._at_once == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads what is resident from /proc")
def test_mapped_weights_are_given_back(tmp_path) -> None:
    """They are packed when a model is compiled, and would stay in memory a second time."""
    weight = np.random.default_rng(0).normal(size=(512, 4096)).astype(np.float32)
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (helper.make_tensor_value_info(name, 1, ["rows", size]) for name, size in (("x", 512), ("y", 4096)))
    model = helper.make_model(helper.make_graph([product], "g", [x], [y], [numpy_helper.from_array(weight, "w")]))
    onnx.save(model, tmp_path / "g.onnx", save_as_external_data=True, location="g.onnx.data")
    engine = backends.backend("openvino").open([tmp_path / "g.onnx"], Options())
    mapped = Path("/proc/self/smaps").read_text().split(f"{tmp_path}/g.onnx.data\n")[1:]
    resident = [int(line.split()[1]) for part in mapped for line in part.splitlines() if line.startswith("Rss:")][:1]
    assert mapped and resident == [0]
    row = np.ones((1, 512), np.float32)
    np.testing.assert_allclose(engine.run({"x": row})["y"], row @ weight, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "precision, here, floats, words",
    [
        ("fp32", {"FP32", "INT8", "BF16"}, "f32", "fp32"),
        ("bf16", {"FP32", "INT8", "BF16"}, "bf16", "bf16"),
        ("bf16", {"FP32", "INT8"}, "f32", "bf16 as fp32"),
        ("int8", {"FP32", "INT8", "BF16"}, "bf16", "int8 with bf16"),
        ("int8", {"FP32", "INT8"}, "f32", "int8 with fp32"),
    ],
)
def test_the_cpu_decides_what_floats_are_computed_in(
    bundle, capsys, monkeypatch, precision, here, floats, words
) -> None:
    """A CPU without bf16 would emulate it, at a fifth of the speed."""
    module = backends.backend("openvino")
    monkeypatch.setattr(module, "capabilities", lambda: here)
    contract = manifest.read(on(bundle, "openvino"))
    stages = [replace(s, precision=precision) if s.runs == "step" else s for s in contract.stages]
    manifest.write(bundle, replace(contract, stages=tuple(stages)))
    assert main(["info", str(bundle)]) == 0
    assert f"denoiser   {words} on openvino" in capsys.readouterr().out
    assert main(["sample", str(bundle), "--labels", "1", "--steps", "2", "-o", str(bundle.with_suffix(".png"))]) == 0
    note = "note: this CPU has no bf16: openvino computes in fp32, and nothing is gained over fp32\n"
    assert capsys.readouterr().err == (note if words == "bf16 as fp32" else "")
    with Pipeline.load(bundle) as pipe:
        engine = pipe.engines.open(pipe.manifest.step)
        for request, *_ in engine._requests.values():
            assert request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT").to_string() == floats


def test_a_graph_that_reads_more_than_the_manifest_says_is_opened(tmp_path) -> None:
    """Its inputs' names are compared by who opens it, and nothing is compiled for an input without a shape."""
    names = [helper.make_tensor_value_info(name, 1, ["batch", 4]) for name in ("x", "surplus", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "surplus"], ["y"])], "g", names[:2], names[2:])
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    engine = backends.backend("openvino").open([tmp_path / "g.onnx"], Options(row={"x": (1, 4)}))
    assert engine.io == (("x", "surplus"), ("y",))


def test_a_refused_provider_leaves_the_bundle_as_it_was(bundle, capsys) -> None:
    """No machine has kernels for it, so that there is no target to verify it on."""
    contract = manifest.read(on(bundle, "onnxruntime"))
    stages = [replace(s, precision="int8") if s.runs == "step" else s for s in contract.stages]
    manifest.write(bundle, replace(contract, stages=tuple(stages), parity={"passed": True}, batch_invariant=True))
    before = (bundle / "manifest.json").read_text()
    assert main(["compile", str(bundle), "--backend", "onnxruntime", "--provider", "cuda"]) == 2
    assert "int8 has no kernels in ONNX Runtime's CUDA provider" in capsys.readouterr().err
    assert (bundle / "manifest.json").read_text() == before


def test_auto_takes_the_first_that_can(monkeypatch) -> None:
    assert backends.choose("auto") == "openvino"
    assert backends.choose("auto", "fp16") == "onnxruntime"
    assert backends.choose("auto", "fp8") == "tensorrt-rtx"  # which compiles here and runs elsewhere
    assert backends.choose("onnxruntime") == "onnxruntime"
    with pytest.raises(UsageError, match="has no fp8; it has fp32, fp16"):
        backends.choose("onnxruntime", "fp8")
    assert backends.choose("onnxruntime", "bf16") == "onnxruntime"  # on CUDA, so that nothing chooses it unasked
    monkeypatch.setattr(backends.backend("openvino"), "version", lambda: None)
    assert backends.choose("auto") == "onnxruntime"
    monkeypatch.setattr(Flavour, "version", lambda self: None)
    extras = r"'dit-runtime\[tensorrt\]' or 'dit-runtime\[tensorrt-rtx\]' or 'dit-runtime\[openvino\]'"
    with pytest.raises(UsageError, match=f"no backend for bf16 is installed: pip install {extras}"):
        backends.choose("auto", "bf16")
    with pytest.raises(UsageError, match=r"not installed: pip install 'dit-runtime\[openvino\]'"):
        backends.choose("openvino")


def test_info_says_what_is_here(capsys) -> None:
    assert main(["info", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["backends"]
    assert table["onnxruntime"] == onnxruntime.__version__
    assert openvino.__version__.startswith(table["openvino"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_engine_refuses(bundle, backend) -> None:
    step = manifest.read(on(bundle, backend)).step
    files = [bundle / name for name in step.files]
    module = backends.backend(backend)
    with pytest.raises(UsageError, match="threads is 0"):
        module.open(files, Options(threads=0))
    with pytest.raises(UsageError, match="provider 'tpu'"):
        module.open(files, Options(provider="tpu"))
    files[0].write_bytes(b"\x00\x01 no graph")
    with pytest.raises(UsageError, match=f"{files[0].name}: .* does not open it"):
        module.open(files, Options())


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_memory_keeps_one_stage_open(handmade, bundle, backend, monkeypatch) -> None:
    on(bundle, backend)
    opened: list[str] = []
    for name in BACKENDS:
        module = backends.backend(name)
        real = module.open

        def recording(files, options, real=real, name=name):
            opened.append(f"{files[0].name.partition('.')[0]} on {name}")
            assert options.low_memory
            return real(files, options)

        monkeypatch.setattr(module, "open", recording)
    monkeypatch.chdir(bundle.parent)
    with Pipeline.load(bundle.name, low_memory=True) as pipe:
        assert opened == []
        monkeypatch.chdir("/")  # as a daemon does
        low = pipe.sample([2, 4], steps=3, seed=4)
        assert [*pipe.engines.opened] == ["decoder"]
    assert opened == ["conditioner on onnxruntime", f"denoiser on {backend}", f"decoder on {backend}"]
    monkeypatch.undo()
    with Pipeline.load(bundle) as pipe:
        assert np.abs(low.astype(int) - pipe.sample([2, 4], steps=3, seed=4)).max() <= 1


def test_low_memory_opens_each_of_many_stages_once(copied, monkeypatch) -> None:
    opened: list[str] = []
    module = backends.backend("onnxruntime")
    real = module.open
    monkeypatch.setattr(module, "open", lambda files, options: opened.append(files[0].stem) or real(files, options))
    condition = {"words": np.ones((5, 3, 4)), "pooled": np.arange(25).reshape(5, 5)}  # more rows than an engine takes
    with Pipeline.load(copied("wave"), low_memory=True) as pipe:
        pipe.sample(condition=condition, steps=6, output="latents")
    assert sorted(opened) == ["conditioner", "context", "denoiser", "modulation", "summary"]


def test_info_says_why_an_installed_backend_cannot_run(monkeypatch, capsys) -> None:
    monkeypatch.setattr(Flavour, "version", lambda _: "1.7")
    monkeypatch.setattr(Flavour, "why_unavailable", lambda _: "no NVIDIA driver")
    assert main(["info"]) == 0
    assert "backend tensorrt-rtx: 1.7, and cannot run here: no NVIDIA driver\n" in capsys.readouterr().out
