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
from dit_runtime.conditioning import Table

from dit_runtime import Pipeline, UsageError, backends
from dit_runtime.backends import Options
from dit_runtime.backends.trt import Flavour
from dit_runtime.bundle import manifest
from dit_runtime.cli import main

BACKENDS = ["openvino", "onnxruntime"]  # those of every CPU


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dit-run"


def on(bundle: Path, backend: str) -> Path:
    """The same bundle, run by another backend."""
    contract = manifest.read(bundle)
    graphs = {name: replace(graph, backend=backend) for name, graph in contract.graphs.items()}
    manifest.write(bundle, replace(contract, graphs=graphs))
    return bundle


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_picture_whatever_the_backend(own_embedders, tmp_path, backend) -> None:
    import shutil

    with Pipeline.load(own_embedders.bundle) as pipe:
        expected = pipe.sample([207, 360, 1], steps=4, seed=[1, 2, 3])
    copy = on(Path(shutil.copytree(own_embedders.bundle, tmp_path / "copy")), backend)
    with Pipeline.load(copy, threads=1) as pipe:
        for labels, seeds in (
            ([207, 360, 1], [1, 2, 3]),
            ([360], [2]),
        ):  # two shapes: a model of its own, then a free one
            pictures = pipe.sample(labels, steps=4, seed=seeds).astype(int)
            for picture, seed in zip(pictures, seeds, strict=True):
                difference = np.abs(picture - expected[seed - 1])
                assert difference.max() <= 1 and (difference > 0).mean() < 1e-3  # fp32, rounded to 256 levels
        alone = pipe.sample([360], steps=4, seed=2, guidance=1.0)
        assert np.abs(alone.astype(int) - expected[1]).max() > 10  # another question has another answer


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_form_of_its_own_is_what_the_backend_opens(own_embedders, backend) -> None:
    contract = manifest.read(own_embedders.bundle)
    graph = replace(contract.graphs["denoiser"], backend=backend)
    assert graph.files == (f"denoiser.{backend}.onnx", "denoiser.onnx.data")
    assert (own_embedders.bundle / graph.files[0]).stat().st_size < 100_000  # the weights are not there twice


def test_compiled_models_are_kept_in_the_users_cache(meta_copy, cache) -> None:
    on(meta_copy, "openvino")
    before = sorted(path.name for path in meta_copy.iterdir())
    with Pipeline.load(meta_copy) as pipe:
        first = pipe.sample([1], steps=2, output="latents")
    (folder,) = cache.iterdir()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.blob")}
    assert kept and sorted(path.name for path in meta_copy.iterdir()) == before
    with Pipeline.load(meta_copy) as pipe:
        again = pipe.sample([1], steps=2, output="latents")
    np.testing.assert_array_equal(again, first)
    assert {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.blob")} == kept


@pytest.mark.parametrize("why", ["a file in its place", "no home"])
def test_a_cache_that_cannot_be_is_done_without(meta_copy, tmp_path, monkeypatch, why) -> None:
    if why == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        (tmp_path / "cache").write_text("")
    with Pipeline.load(on(meta_copy, "openvino")) as pipe:
        assert np.isfinite(pipe.sample([1], steps=2, output="latents")).all()


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")  # as pathlib's, of a user id without an entry


@pytest.mark.parametrize(
    "flags, exact", [("sse2 avx2 avx512f", True), ("sse2 avx2 avx_vnni", False), ("asimd i8mm", False), (None, True)]
)
def test_products_do_not_saturate_where_there_is_no_vnni(meta_copy, tmp_path, monkeypatch, flags, exact) -> None:
    """ONNX Runtime does as it is asked on every x86 CPU, at 0.4 of the speed, so that it is asked is what counts."""
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}")
    monkeypatch.setattr(backends.backend("onnxruntime"), "CPU", tmp_path / "cpuinfo")
    graph = manifest.read(on(meta_copy, "onnxruntime")).graphs["denoiser"]
    engine = backends.backend("onnxruntime").open([meta_copy / name for name in graph.files], Options())
    settings = engine._session.get_session_options()
    if exact:
        assert settings.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError, match="x64quantprecision"):
            settings.get_session_config_entry("session.x64quantprecision")


def test_rows_at_once_are_rows_in_one_batch(meta_copy, tmp_path, monkeypatch) -> None:
    """OpenVINO runs the row with the label and the one with the null label each on half of an even number of threads,
    where cores are alike; guidance moves three channels of four, and each sample has a weight of its own."""
    on(meta_copy, "openvino")
    module = backends.backend("openvino")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(module, "UNLIKE", tmp_path / "cpu_atom")
    noise = np.random.default_rng(3).normal(size=(3, *manifest.read(meta_copy).latent_shape))

    def answers(threads: int) -> tuple[type, list[np.ndarray]]:
        found = []
        with Pipeline.load(meta_copy, threads=threads) as pipe:
            for batch in (1, 3, 1):  # its own shape, another, and back
                x, labels = noise[:batch], [2, 5, 7][:batch]
                times, ids = np.full(batch, 300, np.float32), (labels, [12] * batch)
                rows = [pipe.condition(times, np.array(some)) for some in ids]
                found += pipe.denoise(x, np.stack(rows), np.array([4, 1.5, 7], np.float32)[:batch])
                found += pipe.denoise(x, rows[0][None], np.ones(batch, np.float32))  # without guidance
            return type(pipe._engines["denoiser"]), found

    kind, stacked = answers(1)
    assert kind is module.OvEngine and answers(3)[0] is module.OvEngine
    kind, halves = answers(2)
    assert kind is module.Halves
    for one, other in zip(halves, stacked, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())
    (tmp_path / "cpu_atom").mkdir()
    assert answers(2)[0] is module.OvEngine


def test_auto_takes_the_first_that_can(monkeypatch) -> None:
    assert backends.choose("auto") == "openvino"
    assert backends.choose("auto", "fp16") == "onnxruntime"
    assert backends.choose("auto", "fp8") == "tensorrt-rtx"  # which compiles here and runs elsewhere
    assert backends.choose("onnxruntime") == "onnxruntime"
    with pytest.raises(UsageError, match="has no bf16; it has fp32, fp16"):
        backends.choose("onnxruntime", "bf16")
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
def test_what_an_engine_refuses(meta_copy, backend) -> None:
    graph = manifest.read(on(meta_copy, backend)).graphs["denoiser"]
    files = [meta_copy / name for name in graph.files]
    module = backends.backend(backend)
    with pytest.raises(UsageError, match="threads is 0"):
        module.open(files, Options(threads=0))
    with pytest.raises(UsageError, match="provider 'tpu'"):
        module.open(files, Options(provider="tpu"))
    files[0].write_bytes(b"\x00\x01 no graph")
    with pytest.raises(UsageError, match=f"{files[0].name}: .* does not open it"):
        module.open(files, Options())


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_memory_keeps_one_graph_open(own_embedders, tmp_path, backend, monkeypatch) -> None:
    import shutil

    bundle = on(Path(shutil.copytree(own_embedders.bundle, tmp_path / "copy")), backend)
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
        low = pipe.sample([5, 9], steps=3, seed=4)
        assert [*pipe._engines] == ["decoder"]
    assert opened == ["conditioner on onnxruntime", f"denoiser on {backend}", f"decoder on {backend}"]
    monkeypatch.undo()
    with Pipeline.load(bundle) as pipe:
        assert np.abs(low.astype(int) - pipe.sample([5, 9], steps=3, seed=4)).max() <= 1


def test_a_whole_table_over_budget_is_a_file(monkeypatch) -> None:
    calls = []

    def conditioner(timesteps, labels):
        calls.append(len(labels))
        return np.stack([timesteps, labels], 1)[:, :, None].astype(np.float32).repeat(3, 2)  # (N, K = 2, D = 3)

    for budget, behind in ((10_000, type(None)), (100, np.memmap)):
        calls.clear()
        table = Table(conditioner, [30.0, 20.0, 10.0], [4, 7], 9, 24, 4, budget, whole=True)
        rows = [table(step, slice(0, 2)) for step in range(3)]
        assert sum(calls) == 9 and len(calls) == 3  # every pair once, before the second step
        assert type(table._rows.base) is behind
        for step, t in enumerate((30, 20, 10)):
            np.testing.assert_array_equal(rows[step][:, :, 0, 0], t)
            np.testing.assert_array_equal(rows[step][:, :, 1, 0], [[4, 7], [9, 9]])


def test_info_says_why_an_installed_backend_cannot_run(monkeypatch, capsys) -> None:
    monkeypatch.setattr(Flavour, "version", lambda _: "1.7")
    monkeypatch.setattr(Flavour, "obstacle", lambda _: "no NVIDIA driver")
    assert main(["info"]) == 0
    assert "backend tensorrt-rtx: 1.7, and cannot run here: no NVIDIA driver\n" in capsys.readouterr().out
