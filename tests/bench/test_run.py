"""A whole run with a tiny network, and what a user gets for a mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest

import dit_export.cli
from dit_export.bench.chart import svg
from dit_export.bench.competitors import COMPETITORS, CPU, CUDA, YARDSTICK, choose, groups, memory
from dit_export.bench.machine import describe
from dit_export.bench.report import table
from dit_export.bench.run import Settings, bench
from dit_export.bench.worker import Worker, WorkerError
from dit_export.networks.spec import ModelSpec, model
from dit_runtime.backends import cuda
from dit_runtime.errors import UsageError
from dit_runtime.progress import Progress
from tests.once import once
from tests.tensorrt.fake_cuda import Cuda

TINY = ModelSpec(depth=2, hidden=64, heads=2, patch=2, latent_size=8)
ONLY = ("eager-bf16", "diffusers-fp32", "plain-onnxruntime-fp32", "ours-onnxruntime-fp32")
PRESETS = {"quick": {"steps": 3, "solver": "dpm++1", "guidance": 1.0, "measured": {"agreement": 0.987}}}
SMALL_VAE = {
    "block_out_channels": [16, 16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
}


@pytest.fixture(scope="module")
@once
def ran(tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("bench")
    settings = Settings(
        TINY,
        steps=2,
        rounds=2,
        images=1,
        threads=1,
        only=ONLY,
        memory=1.0,
        folder=folder,
        presets=PRESETS,
        vae=SMALL_VAE,
    )
    return bench(settings, Progress()), folder


@pytest.mark.slow
def test_everyone_is_measured_and_computes_the_same(ran):
    result, _ = ran
    assert [row["name"] for row in result["rows"]] == [YARDSTICK.name, *ONLY]
    for row in result["rows"]:
        assert len(row["step"]["samples"]) == 2 and len(row["image"]["samples"]) == len(row["decode"]["samples"]) == 1
        assert row["image"]["median"] > row["decode"]["median"] > 0
        assert row["load_seconds"] > 0 and row["peak_bytes"] > 10e6 and row["file_bytes"] > 1e5
        # fp32 differs by rounding; bf16 has 8 bits: another network, label or guidance would be 1 and more away.
        assert row["error"] < (1e-4 if row["precision"] == "fp32" else 0.2)
    assert result["rows"][0]["error"] == 0 and result["rows"][1]["error"] > 1e-4
    assert result["problems"] == []


@pytest.mark.slow
def test_ours_draws_with_each_preset(ran):
    result, _ = ran
    *others, ours = result["rows"]
    assert all(row["presets"] == {} for row in others)
    quick = ours["presets"]["quick"]
    assert quick["rows"] == 3 and quick["median"] > quick["decode"]["median"] > 0
    (line,) = [line for line in table(result | {"command": ""}).splitlines() if "preset quick" in line]
    assert (
        re.split(r"\s{2,}", line)[:3] == ["dit-export on ONNX Runtime fp32", "preset quick", "3"] and "98.70%" in line
    )


@pytest.mark.slow
def test_groups_share_the_yardstick(ran):
    """Every competitor runs alone with the yardstick where memory is short."""
    result, _ = ran
    assert result["groups"] == 4
    yardstick, *others = result["rows"]
    assert [row["group"] for row in others] == [1, 2, 3, 4]
    assert len(yardstick["later_groups"]) == 3
    assert yardstick["step"]["times_faster"]["samples"] == [1.0, 1.0]


@pytest.mark.slow
def test_the_floor_was_measured_in_the_same_run(ran):
    result, _ = ran
    assert {"fp32", "bf16"} == set(result["floors"])
    shapes = result["gemms"]["pytorch"]["fp32"]
    assert len(shapes) == 4 and all(len(times) == 2 * 4 for times in shapes.values())  # rounds × groups


@pytest.mark.slow
def test_nothing_is_left_behind(ran):
    """No bundle that was never verified, no weights, no compiler's cache."""
    assert list(ran[1].iterdir()) == []


@pytest.mark.slow
def test_the_result_is_json_and_draws(ran):
    result, _ = ran
    again = json.loads(json.dumps(result | {"command": "dit-export bench"}))
    assert "2x64/2 at 64 px" in table(again)
    ET.fromstring(svg(again))


def test_a_worker_tells_why_it_does_not_start(tmp_path):
    with pytest.raises(WorkerError, match=r"FileNotFoundError: .*job\.json"):
        Worker(YARDSTICK.name, tmp_path, threads=1)


def test_a_worker_that_dies_while_it_waits_is_left_out(tmp_path, monkeypatch):
    """It says so when it is asked, and is closed like any other."""
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **pipes: start([sys.executable, "-c", "print({})"], **pipes))
    worker = Worker("short-lived", tmp_path, threads=1)
    worker._process.wait()
    with pytest.raises(WorkerError, match="the process ended with 0"):
        worker.ask("memory")
    worker.close()


def test_groups_fit_the_budget():
    spec = model("XL/2")
    needs = {one: memory(one, spec, 1) for one in CPU}
    assert groups(CPU, spec, 1, 1e12) == [list(CPU[1:])]
    made = groups(CPU, spec, 1, 20e9)
    assert [one for group in made for one in group] == list(CPU[1:])
    assert 1 < len(made) < len(CPU) - 1
    assert all(needs[YARDSTICK] + sum(needs[one] for one in group) <= 20e9 for group in made)
    assert groups([YARDSTICK], spec, 1, 20e9) == [[]]


def test_only_takes_names_and_patterns():
    assert choose(["ours-*-fp32"])[0] is YARDSTICK
    assert {one.kind for one in choose(["ours-*-fp32"])[1:]} == {"ours"}
    assert choose([]) == list(CPU)
    for everyone in COMPETITORS.values():
        assert len({one.name for one in everyone}) == len({one.title for one in everyone}) == len(everyone)


def test_a_gpu_has_competitors_of_its_own():
    assert choose([], "cuda") == list(CUDA) and choose([], "cuda")[0] is YARDSTICK
    names = {one.name for one in choose(["ours-tensorrt*", "compile-*"], "cuda")}
    assert names == {YARDSTICK.name, "compile-fp16", "compile-bf16"} | {
        f"ours-{backend}-{precision}"
        for backend in ("tensorrt", "tensorrt-rtx")
        for precision in ("fp16", "bf16", "int8", "fp8")
    }
    assert all(memory(one, model("S/2"), 1) > 0 for one in CUDA)
    with pytest.raises(UsageError, match="competitor 'diffusers-fp32' is not known"):
        choose(["diffusers-fp32"], "cuda")


@pytest.mark.parametrize(
    ("driver", "reason"),
    [(Cuda(driver=0), "no NVIDIA driver"), (Cuda(devices=0), "no NVIDIA GPU"), (Cuda(), "no CUDA")],
)
def test_without_a_gpu_it_says_so_in_one_line(capsys, monkeypatch, driver, reason):
    monkeypatch.setattr(cuda, "runtime", lambda: driver)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("dit_export.bench.run._prepare", None)  # which would be called
    assert dit_export.cli.main(["bench", "S/2", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "no benchmark on a GPU here: " in error and reason in error and error.count("\n") == 1


def test_what_the_files_need_is_asked_for_before_the_work(capsys, monkeypatch):
    monkeypatch.setattr("dit_export.bench.run.find_spec", lambda name: None if name == "diffusers" else name)
    monkeypatch.setattr("dit_export.bench.run._prepare", None)  # which would be called
    assert dit_export.cli.main(["bench", "S/2"]) == 2
    error = capsys.readouterr().err
    assert "diffusers not installed; `make gpu-check` times without them" in error and error.count("\n") == 1


def test_a_gpu_is_described(monkeypatch):
    class Known(Cuda):
        def cudaGetDeviceProperties(self, device):
            return 0, SimpleNamespace(name=b"GPU of a test", totalGlobalMem=24 << 30)

    monkeypatch.setattr(cuda, "runtime", Known)
    assert "gpu" not in describe()
    gpu = describe("cuda")["gpu"]
    assert gpu == {
        "name": "GPU of a test",
        "memory_bytes": 24 << 30,
        "compute_capability": "8.9",
        "driver_cuda": 13020,
    }


@pytest.mark.parametrize("release", ["6.18.44-cloud-9-amd64", "6.18", "6.18-rc3"])
def test_a_kernel_is_said_without_its_build(monkeypatch, release):
    monkeypatch.setattr("platform.release", lambda: release)
    assert describe()["system"].split()[1] == "6.18"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["S/3"], "model 'S/3' is not known"),
        (["--only", "eager-fp61"], 'did you mean "eager-fp32"?'),
        (["--rounds", "0"], "rounds"),
        (["--threads", "0"], "threads are at least 1"),
        (["--resolution", "100"], "expected a multiple of 8"),
        (["--svg", "no/such/folder/bench.svg"], "no such folder"),
        (["--device", "tpu"], "device 'tpu' is not known; known: cpu, cuda"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert dit_export.cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
