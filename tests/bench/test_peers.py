"""PyTorch's own ways: what they need, what "fp32" means, and that each computes the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit_export.bench import engines, peers, prepare
from dit_export.bench.competitors import YARDSTICK, Competitor, Job
from dit_export.bench.peers import AheadOfTime, Eager
from dit_export.bench.run import Settings, _Run
from dit_export.bench.subject import Subject
from dit_export.checkpoints.synthetic import synthetic_dit
from dit_export.networks.spec import ModelSpec, model
from dit_runtime import backends
from dit_runtime.backends import ort
from dit_runtime.progress import Progress
from dit_runtime.sampling.process import Process

TINY = ModelSpec(depth=2, hidden=64, heads=2, patch=2, latent_size=8)
OPEN = """
import sys
sys.modules["diffusers"] = None
from pathlib import Path
from dit_export.bench.worker import open_competitor
from dit_export.bench.competitors import Job
import torch
folder = Path(sys.argv[1])
tasks, opened = open_competitor("eager-fp32", Job.read(folder), folder)
tasks["step"]()
print(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
"""


@pytest.fixture(scope="module")
def job() -> Job:
    return Job(TINY, Process(), 2, 3, 1, ("fp32",), {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, job, one_thread) -> Path:
    """The network's weights alone, as on a machine without diffusers."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "weights").mkdir()
    with one_thread():
        save_file(synthetic_dit(TINY, 0).state_dict(), folder / "weights" / "dit.safetensors")
    job.write(folder)
    return folder


def test_a_network_is_timed_without_diffusers_and_in_fp32(folder) -> None:
    """PyTorch's own default is TF32 in convolutions."""
    done = subprocess.run([sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False False\n"), done.stderr


def test_the_loop_on_the_device_is_the_solvers(folder, job, one_thread) -> None:
    with one_thread():
        eager = Eager(YARDSTICK, job, folder / "weights")
        own, by_solver = eager.sample(), Subject.sample(eager)
    assert np.linalg.norm(own - by_solver) <= 1e-5 * np.linalg.norm(by_solver)  # float32 against float64; measured 2e-7
    assert np.linalg.norm(eager.latents - by_solver) > 0.1 * np.linalg.norm(by_solver)


@pytest.mark.slow  # it compiles C++
def test_a_network_compiled_ahead_of_time_computes_the_same(folder, job, one_thread) -> None:
    with one_thread():
        expected = Eager(YARDSTICK, job, folder / "weights").prediction()
        got = AheadOfTime(Competitor("aoti", "pytorch", "fp32"), job, folder / "weights").prediction()
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    assert (folder / "caches" / "aoti-fp32.pt2").is_file()


def test_a_gpu_always_draws_whole_images(tmp_path) -> None:
    """XL/2 takes minutes an image on a CPU, and about 0.1 s on a GPU."""
    xl = model("XL/2")
    for device, images in (("cpu", 0), ("cuda", 1)):
        job = Job(xl, Process(), 1, 25, 1, (), {}, device)
        assert _Run(Settings(xl, device=device), job, tmp_path, {}, Progress()).images == images


@pytest.mark.parametrize("library", ["tensorrt-rtx", "onnxruntime"])
def test_what_cannot_run_here_is_not_compiled(tmp_path, monkeypatch, job, library) -> None:
    ours, job = Competitor("ours", library, "fp16"), replace(job, device="cuda")
    monkeypatch.setattr(ort, "load", lambda: SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"]))
    if library == "onnxruntime":
        reason = "provider 'cuda' is not in this onnxruntime: "
    else:
        assert (reason := backends.backend(library).why_unavailable())
    monkeypatch.setattr(prepare, "build_scratch_bundle", None)  # which would be called
    monkeypatch.setattr(prepare, "trace_graphs", lambda folder, *_: folder.mkdir())
    monkeypatch.setattr(prepare, "synthetic_vae", lambda seed, config: None)
    monkeypatch.setattr(prepare, "make_decoder", lambda vae: torch.nn.Identity())
    monkeypatch.setattr(prepare, "_fix_rows", lambda path, rows: None)
    left_out = prepare.prepare(tmp_path, job, [YARDSTICK, ours], Progress())
    assert left_out.keys() == {ours.name} and left_out[ours.name].startswith(reason)


def test_a_plain_export_multiplies_fp32_in_fp32(tmp_path, monkeypatch, job) -> None:
    """ONNX Runtime's own default on CUDA is TF32."""
    asked = []

    class Session:
        def __init__(self, path, settings, providers):
            asked.append(dict(providers))

        def get_providers(self):
            return ["CUDAExecutionProvider"]

    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    engines._onnxruntime(tmp_path, "fp32", Job(TINY, Process(), 1, 1, 1, (), {}, "cuda"))
    assert asked[0]["CUDAExecutionProvider"]["use_tf32"] == "0"


class _Graph:
    """A CUDA graph that knows whether it is being recorded."""

    recording = False

    def __init__(self) -> None:
        self.replays = 0

    def __enter__(self):
        _Graph.recording = True

    def __exit__(self, *error):
        _Graph.recording = False

    def replay(self):
        self.replays += 1


def test_a_captured_network_reads_what_it_is_given(monkeypatch) -> None:
    graph, held = _Graph(), (torch.zeros(3),)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: type("Stream", (), {"wait_stream": lambda self, other: None})())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: _Graph())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    replay = peers._captured(lambda x: 2 * x, held)
    replay(torch.ones(3))
    assert graph.replays == 1 and held[0].tolist() == [1, 1, 1]
