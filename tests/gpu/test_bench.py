"""The benchmark's own ways to a GPU, on one: what is captured computes the same, and the floor is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dit_export.bench.competitors import Competitor, Job
from dit_export.bench.floor import GEMMS, Gemms, bandwidth
from dit_export.networks.spec import ModelSpec
from dit_runtime.backends import cuda
from dit_runtime.sampling.process import Process
from tests.gpu.steps import cut

pytestmark = pytest.mark.gpu
SPEC = ModelSpec(depth=2, hidden=128, heads=2, patch=2, latent_size=16, num_classes=10)


@pytest.fixture(scope="module")
def torch():
    if reason := cuda.why_unavailable():
        pytest.skip(reason)
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip(f"PyTorch {module.__version__} has no CUDA")
    return module


@pytest.fixture(scope="module")
def weights(torch, tmp_path_factory) -> Path:
    from safetensors.numpy import save_file

    from dit_export.networks.dit import DiT

    pool = np.random.default_rng(0).standard_normal(1 << 16, np.float32)
    with torch.device("meta"):
        state = DiT(SPEC).state_dict()
    folder = tmp_path_factory.mktemp("bench") / "weights"
    folder.mkdir()
    arrays = {name: cut(pool, name, tuple(tensor.shape), 0.0, 0.05) for name, tensor in state.items()}
    save_file(arrays, folder / "dit.safetensors")
    return folder


def test_a_captured_network_computes_what_eager_does(torch, weights) -> None:
    from dit_export.bench.peers import Eager, Graphed

    job = Job(SPEC, Process(), 2, 3, 1, (), {}, "cuda")
    eager = Eager(Competitor("eager", "pytorch", "fp32"), job, weights)
    graphed = Graphed(Competitor("graph", "pytorch", "fp32"), job, weights)
    for seed in range(3):  # of other inputs than those that were captured
        latents, t = np.random.default_rng(seed).standard_normal(eager.latents.shape, np.float32), 100.0 + seed
        np.testing.assert_allclose(graphed.denoise(latents, t), eager.denoise(latents, t), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(graphed.sample(), eager.sample(), rtol=1e-3, atol=1e-4)


def test_the_floor_times_every_precision(torch) -> None:
    seconds = Gemms("pytorch", SPEC, 1, 1, GEMMS["cuda"]["pytorch"], "cuda").run()
    assert {"fp32", "fp16", "bf16", "int8"} <= set(seconds)
    assert all(0 < value < 1e-2 for shapes in seconds.values() for value in shapes.values())
    copied = bandwidth("cuda")
    assert copied is not None and 1e10 < copied < 1e13
