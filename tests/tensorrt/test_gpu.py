"""On a GPU: what a build proves there, with and without CUDA graphs, and that nothing stays behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dit_export.cli import main
from dit_runtime import Pipeline
from dit_runtime.backends import backend, cuda
from dit_runtime.bundle import manifest

pytestmark = pytest.mark.gpu
NAMES = ("tensorrt-rtx", "tensorrt")


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    flavour = backend(request.param)
    if flavour.version() is None:
        pytest.skip(f"{request.param} is not installed")
    if reason := flavour.why_unavailable():
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(scope="module", params=["fp16", "bf16", "int8", "fp8"])
def bundle(request, name, shared_embedders, tmp_path_factory, one_thread) -> Path:
    """The build verifies: each graph at its smallest, a middle and its largest batch, every step, the pictures."""
    folder = tmp_path_factory.mktemp("gpu") / "bundle"
    options = ["--backend", name, "--precision", request.param, "--max-batch", "4", "-o", str(folder)]
    if tuple(map(int, cuda.capability().split("."))) < (8, 9) and request.param == "fp8":
        pytest.skip(f"compute capability {cuda.capability()} has no fp8")
    with one_thread():
        assert main(["build", "--checkpoint", str(shared_embedders.checkpoint), *options]) == 0
    return folder


def test_the_engines_themselves_were_verified(bundle) -> None:
    checks = json.loads((bundle / "parity.json").read_text())["checks"]
    own = {check["name"] for check in checks if not check["name"].startswith(("proof: ", "twin: "))}
    assert {"denoiser: prediction, rel-L2", "denoiser: unguided, rel-L2", "run: latents, rel-L2"} <= own
    assert "run: pictures, PSNR in dB" in own
    assert main(["verify", str(bundle)]) == 0


def test_the_same_with_and_without_cuda_graphs(bundle, monkeypatch, capsys) -> None:
    """Five samples where an engine takes four: the two shapes' graphs are replayed in turn."""
    request = {"labels": [207, 360, 1, 2, 3], "steps": 6, "seed": 3, "output": "latents"}
    with Pipeline.load(bundle) as pipe:
        recorded = pipe.sample(**request)
        np.testing.assert_array_equal(pipe.sample(**request), recorded)

    def refused(self) -> None:
        raise cuda.CudaError("recording is off")

    monkeypatch.setattr(cuda.Recording, "__enter__", refused)
    with Pipeline.load(bundle) as pipe:
        np.testing.assert_array_equal(pipe.sample(**request), recorded)  # the same kernels in the same order
    if manifest.read(bundle).step.backend == "tensorrt":
        assert "no CUDA graph" in capsys.readouterr().err


def test_nothing_stays_on_the_device(bundle) -> None:
    after = []
    for _ in range(4):
        with Pipeline.load(bundle) as pipe:
            pipe.sample([1, 2], steps=3, seed=1, output="latents")
        after.append(cuda.free_memory())
    assert after[-1] >= after[0] - (8 << 20)  # the first run leaves CUDA's own context; a leak grows with each
