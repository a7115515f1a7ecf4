"""An engine's plan, and the driver, the GPU and the TensorRT that are fakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dit_runtime.backends import cuda
from dit_runtime.backends.trt import Flavour
from tests.tensorrt.fake_cuda import Cuda
from tests.tensorrt.fake_tensorrt import TensorRT

BUILT = {"version": "1.7.1", "cuda": 13, "compute_capabilities": ["8.6", "8.9"], "tuning": {}}


@pytest.fixture
def device(monkeypatch) -> Cuda:
    fake = Cuda()
    monkeypatch.setattr(cuda, "runtime", lambda: fake)
    return fake


@pytest.fixture
def trt(device, monkeypatch) -> TensorRT:
    fake = TensorRT(device)
    monkeypatch.setattr(Flavour, "load", lambda self: fake)
    monkeypatch.setattr(Flavour, "version", lambda self: "1.7.1")
    return fake


@pytest.fixture
def plan(tmp_path) -> Path:
    (tmp_path / "denoiser.tensorrt.engine").write_bytes(b"plan")
    return tmp_path / "denoiser.tensorrt.engine"


def rows(count: int) -> np.ndarray:
    return np.arange(3 * count, dtype=np.float32).reshape(count, 3)
