"""Every backend behind the one protocol, on the same bundle; and what low memory keeps open."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest

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
        # Two shapes: a model of its own, then a free one.
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


def test_compiled_models_are_kept_in_the_users_cache(bundle, cache) -> None:
    on(bundle, "openvino")
    before = sorted(path.name for path in bundle.iterdir())
    with Pipeline.load(bundle) as pipe:
        first = pipe.sample([1], steps=2, output="latents")
    (folder,) = cache.iterdir()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.blob")}
    assert kept and sorted(path.name for path in bundle.iterdir()) == before
    with Pipeline.load(bundle) as pipe:
        again = pipe.sample([1], steps=2, output="latents")
    np.testing.assert_array_equal(again, first)
    assert {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.blob")} == kept


@pytest.mark.parametrize("why", ["a file in its place", "no home"])
def test_a_cache_that_cannot_be_is_done_without(bundle, tmp_path, monkeypatch, why) -> None:
    if why == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        (tmp_path / "cache").write_text("")
    with Pipeline.load(on(bundle, "openvino")) as pipe:
        assert np.isfinite(pipe.sample([1], steps=2, output="latents")).all()


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")  # as pathlib's, of a user id without an entry


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


def test_rows_at_once_are_rows_in_one_batch(bundle, tmp_path, monkeypatch) -> None:
    """OpenVINO runs a sample's own condition and its negative each on half of an even number of threads, where cores
    are alike; each sample has a weight of its own."""
    on(bundle, "openvino")
    module = backends.backend("openvino")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(module, "UNLIKE", tmp_path / "cpu_atom")
    noise = np.random.default_rng(3).normal(size=(3, *manifest.read(bundle).state.shape))

    def answers(threads: int) -> tuple[type, list[np.ndarray]]:
        found = []
        with Pipeline.load(bundle, threads=threads) as pipe:
            for batch in (1, 3, 1):  # its own shape, another, and back
                x, own = noise[:batch], {"labels": np.array([2, 0, 4][:batch])}
                weights = np.array([4, 1.5, 7], np.float32)[:batch]
                for negative in ({"labels": np.array([5])}, None):  # with guidance, and without
                    inputs = pipe.engines.inputs(np.array([300.0]), own, negative, weights)
                    found += pipe.engines.denoise(x, inputs, 0)
            return type(pipe.engines.opened["denoiser"]), found

    kind, stacked = answers(1)
    assert kind is module.OvEngine and answers(3)[0] is module.OvEngine
    kind, halves = answers(2)
    assert kind is module.Halves
    for one, other in zip(halves, stacked, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())
    (tmp_path / "cpu_atom").mkdir()
    assert answers(2)[0] is module.OvEngine


@pytest.mark.parametrize("row", [(6,), (4, 2, 2), (4, 3, 2, 2)], ids=str)
def test_guidance_moves_the_leading_channels_of_any_state(row) -> None:
    """The state may have any rank; inputs without groups go to both runs."""
    random = np.random.default_rng(1)
    x, context = random.normal(size=(3, *row)), random.normal(size=(2, 3, 5))
    weights = np.array([4, 1.5, 7], np.float32)

    class Two:
        io, close = ((), ()), None

        def run_at_once(self, asked):
            assert all(rows["x"] is x and rows["context"].shape == (1, 3, 5) for rows in asked)
            factors = [rows["context"][0].sum(axis=1).reshape(-1, *(1 for _ in row)) for rows in asked]
            return [{"prediction": x * factor, "variance": factor} for factor in factors]

    halves = backends.backend("openvino").Halves(Two(), 3, ("context",))
    found = halves.run({"x": x, "context": context, "guidance": weights})
    first, last = (x * part.sum(axis=1).reshape(-1, *(1 for _ in row)) for part in context)
    strength = weights.reshape(-1, *(1 for _ in row))
    np.testing.assert_allclose(found["prediction"][:, :3], (last + strength * (first - last))[:, :3])
    np.testing.assert_array_equal(found["prediction"][:, 3:], first[:, 3:])


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
    extras = r"'dit-export\[tensorrt\]' or 'dit-export\[tensorrt-rtx\]' or 'dit-export\[openvino\]'"
    with pytest.raises(UsageError, match=f"no backend for bf16 is installed: pip install {extras}"):
        backends.choose("auto", "bf16")
    with pytest.raises(UsageError, match=r"not installed: pip install 'dit-export\[openvino\]'"):
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
