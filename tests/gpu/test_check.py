"""The check that a GPU gets: its pack, its steps on a CPU with fakes, and what a killed step leaves."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from dit_export.bench.competitors import Job
from dit_export.networks.spec import ModelSpec
from dit_runtime.errors import UsageError
from dit_runtime.progress import Progress
from dit_runtime.sampling.process import Process
from tests.bench.test_run import SMALL_VAE
from tests.gpu import check, pack, steps
from tests.gpu.check import Step
from tests.gpu.place import Place, Skipped
from tests.gpu.steps import cut, stored
from tests.tamper import edit
from tests.tensorrt.fake_tensorrt import TensorRT

ABSENT = ["diffusers", "onnx_graphsurgeon", "openvino", "tensorrt", "tensorrt_rtx", "modelopt"]
TINY = ModelSpec(depth=2, hidden=64, heads=2, patch=2, latent_size=8, num_classes=10)
DRY = (
    "fill",
    "environment",
    "device",
    "reference",
    "ort-fp*",
    "demo-*",
    "pipeline-fp32",
    "torch-*-fp32",
    "torch-graph-*",
    "ceilings",
    "program",
    "sanitizer",
    "rtx",
)


def step_of(table: dict[str, Any]) -> dict[str, Any]:
    return next(stage for stage in table["stages"] if stage["runs"] == "step")


@pytest.fixture
def packed(tmp_path, shared_embedders, one_thread) -> Path:
    """Packs of a tiny network and of a bundle that was verified."""
    folder, packs = tmp_path / "made", tmp_path / "packs"
    folder.mkdir()
    packs.mkdir()
    job = Job(TINY, Process(), 1, 2, 1, (), SMALL_VAE, "cuda")
    with one_thread():
        bundles = pack.write_graphs(folder, job, ["fp32", "fp16"], Progress())
    demo = shutil.copytree(shared_embedders.bundle, folder / "demo-fp32")
    for_gpus = shutil.copytree(demo, folder / "demo-bf16")
    edit(for_gpus, lambda table: step_of(table).update(precision="bf16"))
    (folder / "program").mkdir()
    program = folder / "program" / "dit-generate"
    program.write_text('#!/bin/sh\necho "$*" >&2\ntest "$2 $3" = "--provider cpu"\n')
    program.chmod(0o755)
    pack.write_pack(packs / "first.tar.xz", folder, [folder / "job.json", *bundles])
    pack.write_pack(packs / "second.tar.xz", folder, [Path(demo), Path(for_gpus), program.parent])
    assert (packs / "first.tar.xz").stat().st_size < 200_000  # graphs alone; the weights are 1 MB
    return packs


def test_a_dry_run_goes_every_way_of_a_cpu(packed, tmp_path) -> None:
    """The check has only those packages that the machine with a GPU has."""
    site = tmp_path / "work" / "site"
    site.mkdir(parents=True)
    (site / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))")
    ends = check.check(packed, tmp_path / "work", tmp_path / "out", dry=True, only=DRY, seconds=600)
    log = (tmp_path / "out" / check.LOG).read_text()
    how = {end["step"]: end["end"] for end in ends}
    skipped = {name for name, end in how.items() if end == "skipped"}
    need_gpu = {"demo-tf32", "torch-graph-fp16", "sanitizer", "rtx"}
    assert skipped == need_gpu | {"demo-fp16", "demo-bf16"}, log
    assert {end for name, end in how.items() if name not in skipped} == {"passed"}, log
    rows = check.read(tmp_path / "out")
    timed = [row for row in rows if row["step"].startswith("ort-") and "ms" in row]
    for precision, limit in (("fp32", 1e-5), ("fp16", 5e-2)):  # the same random weights; others would be 1 away
        errors = {(row["mode"], row["batch"]): row["error"] for row in timed if row["precision"] == precision}
        assert errors.keys() == {(mode, batch) for mode in ("plain", "binding", "graph") for batch in (1, 8)}
        assert max(errors.values()) < limit
    (verified,) = [row for row in rows if row["step"] == "demo-fp32" and "checks" in row]
    assert verified["checks"] > 5 and verified["failed"] == []
    program = [
        (row["bundle"], row.get("mode", "verify"), row.get("passed", row.get("skipped")))
        for row in rows
        if row["step"] == "program" and "end" not in row
    ]
    no_kernels = "bf16 has no kernels in ONNX Runtime's CPU provider; use provider cuda"
    assert program == [
        ("demo-bf16", "verify", no_kernels),
        ("demo-fp32", "verify", True),
        ("demo-fp32", "open and draw", True),
    ]
    assert next(end["why"] for end in ends if end["step"] == "demo-bf16") == no_kernels
    assert {row["precision"] for row in rows if "floor_ms" in row} == {"fp32", "bf16"}
    assert "ort-fp32" in check.table(rows) and "graph fp32 8" in check.table(rows)


def test_a_step_that_dies_or_hangs_loses_nothing(tmp_path, monkeypatch) -> None:
    """The output of a step that dies stays, and the next step runs."""
    steps = {
        "dies": "import os; print('{}', file=open(OUT, 'a')); os.abort()",
        "hangs": "import time; time.sleep(60)",
        "ends": 'print(\'{"step": "ends", "end": "passed", "seconds": 0}\', file=open(OUT, \'a\'))',
    }
    start = check.subprocess.Popen

    def popen(command, **options):
        code = steps[command[command.index("--step") + 1]]
        return start([sys.executable, "-c", f"OUT = {str(tmp_path / check.ROWS)!r}; {code}"], **options)

    monkeypatch.setattr(check.subprocess, "Popen", popen)
    monkeypatch.setattr(check, "STEPS", tuple(Step(name, 1.0 if name == "hangs" else 60.0, "") for name in steps))
    ends = check.check(tmp_path / "no packs", tmp_path / "work", tmp_path, seconds=60)
    assert [(end["step"], end["end"]) for end in ends] == [("dies", "killed"), ("hangs", "killed"), ("ends", "passed")]
    assert "ended with -6" in ends[0]["why"] and ends[1]["why"] == "over its limit of 1 s"
    rows = check.read(tmp_path)
    assert {} in rows and rows[-1]["end"] == "passed"


def test_a_second_call_adds_to_the_first(tmp_path, monkeypatch) -> None:
    """It unpacks only what is new, keeps the rows of the first, and does not take them for its own."""
    packs, work, out = (tmp_path / name for name in ("packs", "work", "out"))
    packs.mkdir()
    (tmp_path / "manifest.json").write_text("as packed")
    pack.write_pack(packs / "first.tar.xz", tmp_path, [tmp_path / "manifest.json"])
    row = json.dumps({"step": "writes", "end": "passed", "seconds": 0})
    codes = iter([f"print({row!r}, file=open({str(out / check.ROWS)!r}, 'a'))", ""])
    start = check.subprocess.Popen
    monkeypatch.setattr(
        check.subprocess, "Popen", lambda _, **options: start([sys.executable, "-c", next(codes)], **options)
    )
    monkeypatch.setattr(check, "STEPS", (Step("writes", 60.0, ""),))
    ends = check.check(packs, work, out)
    (work / "manifest.json").write_text("as filled")
    (tmp_path / "program").touch()
    pack.write_pack(packs / "second.tar.xz", tmp_path, [tmp_path / "program"])
    ends += check.check(packs, work, out)
    assert (work / "manifest.json").read_text() == "as filled" and (work / "program").is_file()
    assert [end["end"] for end in ends] == ["passed", "killed"]  # the second process wrote nothing
    rows = check.read(out)
    assert [row["packs"] for row in rows if "packs" in row] == [["first.tar.xz"], ["second.tar.xz"]]
    assert [row["end"] for row in rows if "end" in row] == ["passed", "killed"]
    assert (out / check.LOG).read_text() == "==== writes\n==== writes\n"


def test_what_does_not_fit_in_time_is_not_started(tmp_path) -> None:
    ends = check.check(tmp_path / "no packs", tmp_path / "work", tmp_path, seconds=1)
    assert {end["end"] for end in ends} == {"not started"} and len(ends) == len(check.STEPS)


def test_a_program_that_draws_nothing_fails(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Place, "bundle", Place.folder)  # there is none in it
    for name in ("program", "demo-fp32"):
        (tmp_path / name).mkdir()
    binary = tmp_path / "program" / "dit-generate"
    binary.write_text('#!/bin/sh\ncase "$*" in *--verify*) exit 0; esac\nexit 3\n')
    binary.chmod(0o755)
    assert [row["passed"] for row in steps.program(Place(tmp_path))] == [True, False]


def test_a_sanitizer_that_is_not_installed_is_skipped(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Skipped, match="compute-sanitizer is not installed"):
        next(steps.sanitizer(Place(tmp_path)))


def test_what_tensorrt_rtx_says_of_a_gpu_is_recorded(tmp_path, monkeypatch) -> None:
    def refuse(logger: Any) -> None:
        logger.log(1, "compute capability 9.0 is not supported\nand more")
        raise TypeError("factory function returned nullptr")

    module = ModuleType("tensorrt_rtx")
    vars(module).update(__version__="1", ILogger=TensorRT.ILogger, Runtime=lambda logger: object(), Builder=refuse)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    runtime, builder = steps.rtx(Place(tmp_path))
    assert (runtime["starts"], runtime["error"], runtime["says"]) == ("Runtime", "", "")
    assert builder["error"] == "TypeError: factory function returned nullptr"
    assert builder["says"] == "compute capability 9.0 is not supported"


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", ("CUDAExecutionProvider", {"use_tf32": "0"})])
def test_tf32_is_forced_on_whatever_a_session_asks_for(monkeypatch, provider) -> None:
    opened = []
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, providers, **__: opened.append(providers))
    steps._multiply_in_tf32()
    onnxruntime.InferenceSession("denoiser.onnx", None, providers=[provider, "CPUExecutionProvider"])
    assert opened == [[("CUDAExecutionProvider", {"use_tf32": "1"}), ("CPUExecutionProvider", {})]]


def fat_binary(*architectures: int) -> bytes:
    """A header, and an entry of 8 bytes of code for each."""
    entries = b"".join(
        struct.pack("<HHIQ", 2, 0x101, 64, 8) + bytes(12) + struct.pack("<I", architecture) + bytes(32) + b"\xab" * 8
        for architecture in architectures
    )
    return pack.FAT_BINARY + struct.pack("<HHQ", 1, pack.HEADER, len(entries)) + entries


def test_one_architectures_code_stays_where_it_was(tmp_path) -> None:
    library = tmp_path / "library.so"
    host = b"host code" + pack.FAT_BINARY + bytes(20)  # the same four bytes by chance
    library.write_bytes(host + fat_binary(80, 90, 120) + b"between" + fat_binary(90) + b"end")
    before = library.read_bytes()
    assert pack.keep_architecture(library, 90) == 3 * 8
    after = library.read_bytes()
    assert len(after) == len(before) and after.count(b"\xab" * 8) == 1
    first = len(host) + pack.HEADER
    assert after[first + 72 + 64 : first + 2 * 72] == b"\xab" * 8  # the second entry's
    assert after.startswith(host) and after.endswith(b"end") and b"between" in after


def test_a_pack_over_the_upload_limit_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pack, "LIMIT", 1000)
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(2000))
    with pytest.raises(UsageError, match=r"expected at most 0\.0 MB, the upload limit"):
        pack.write_pack(tmp_path / "pack.tar.xz", tmp_path, [tmp_path / "noise"])


def test_a_wheel_that_cannot_be_had_is_one_sentence(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"onnxruntime-gpu==1.* for CPython 312 cannot be downloaded here"):
        pack.fetch_wheel(tmp_path)  # the tests ask no registry


def test_only_a_wheel_of_the_pinned_version_is_taken(tmp_path, monkeypatch) -> None:
    (tmp_path / f"onnxruntime_gpu-1.0-cp{pack.PYTHON}-cp{pack.PYTHON}-linux.whl").touch()  # of an earlier pin
    monkeypatch.setattr(pack.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    with pytest.raises(UsageError, match="cannot be downloaded here"):
        pack.fetch_wheel(tmp_path)


@pytest.mark.parametrize("engine", [b"", pack.ENGINE])
def test_a_program_without_the_engine_of_gpus_is_refused(tmp_path, monkeypatch, engine) -> None:
    library = tmp_path / "libdit.so.1.2"
    library.write_bytes(b"symbols")
    (tmp_path / "libdit-onnxruntime.so").write_bytes(b"symbols " + engine)  # a plugin, which ldd does not know
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "dit-generate").write_bytes(b"program")
    listed = f"\tlibdit.so.1 => {library} (0x1)\n\tlibc.so.6 => /lib/libc.so.6 (0x2)\n\t/lib64/ld-linux (0x3)\n"
    monkeypatch.setattr(pack.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=listed))
    if engine:
        pack.copy_program(tmp_path, tmp_path / "packed")
        packed = {path.name for path in (tmp_path / "packed").iterdir()}
        assert packed == {"dit-generate", "libdit.so.1", "libdit-onnxruntime.so"}
    else:
        with pytest.raises(UsageError, match="built without CUDA_ROOT"):
            pack.copy_program(tmp_path, tmp_path / "packed")


def test_a_folder_for_packs_keeps_what_else_it_holds(tmp_path, monkeypatch) -> None:
    for name in (*pack.PACKS, "notes.txt"):
        (tmp_path / name).touch()
    monkeypatch.setattr(pack, "fetch_wheel", lambda folder: folder / "no wheel")
    with pytest.raises(FileNotFoundError):
        pack.main(["-o", str(tmp_path), "--program", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(("kind", "suffix"), [("float32", ""), ("float16", "_10"), ("bfloat16", "_16")])
def test_weights_are_described_under_the_name_that_they_were_cast_from(tmp_path, kind, suffix) -> None:
    values = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    number = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[kind]
    tensor = TensorProto(
        name=f"val_10{suffix}", data_type=number, dims=values.shape, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", "step.onnx.data"), ("offset", 64)):
        tensor.external_data.add(key=key, value=str(value))
    graph = helper.make_graph([], "step", [], [], [tensor])
    onnx.save(helper.make_model(graph), tmp_path / "step.onnx")
    (tmp_path / "step.onnx.data").write_bytes(bytes(64) + stored(values, kind).tobytes())
    pack.strip_weights(tmp_path)
    assert not (tmp_path / "step.onnx.data").exists()
    table = json.loads((tmp_path / pack.WEIGHTS).read_text())
    assert table["files"] == {"step.onnx.data": 64 + 4 * (4 if kind == "float32" else 2)}
    (described,) = table["tensors"]
    assert described["name"] == "val_10" and described["kind"] == kind
    assert (described["mean"], described["deviation"]) == (3.0, pytest.approx(values.std()))


def test_a_tensor_has_the_same_numbers_in_every_precision() -> None:
    pool = np.random.default_rng(0).standard_normal(1 << 10, np.float32)
    values = cut(pool, "blocks.0.attn.qkv.weight", (60, 40), 0.5, 0.1)  # larger than the pool
    assert values.mean() == pytest.approx(0.5, abs=0.02) and values.std() == pytest.approx(0.1, rel=0.1)
    np.testing.assert_array_equal(values, cut(pool, "blocks.0.attn.qkv.weight", (60, 40), 0.5, 0.1))
    assert not np.array_equal(values, cut(pool, "blocks.1.attn.qkv.weight", (60, 40), 0.5, 0.1))
    np.testing.assert_allclose(stored(values, "float16").astype(np.float32), values, rtol=2**-11)
    bits = stored(values, "bfloat16").astype(np.uint32) << 16
    np.testing.assert_allclose(bits.view(np.float32), values, rtol=2**-8)
