"""Pipelines and engines on the CUDA provider that is a fake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dit_runtime import Pipeline
from dit_runtime.backends import Options, cuda, ort, ort_cuda
from tests.runtime.ort_cuda.fakes import Device, Runtime
from tests.runtime.test_loops import Host


@pytest.fixture
def device(monkeypatch) -> Device:
    fake = Device()
    monkeypatch.setattr(cuda, "runtime", lambda: fake)
    return fake


@pytest.fixture
def runtime(device, monkeypatch) -> Runtime:
    fake = Runtime(device)
    monkeypatch.setattr(ort, "load", lambda: fake)
    return fake


@pytest.fixture
def on_gpu(runtime, handmade):
    """Opens a kind's bundle on the provider; all are closed at the end."""
    pipes: list[Pipeline] = []

    def open_(kind: str = "labels", **options: object) -> Pipeline:
        pipes.append(Pipeline.load(handmade(kind), **{"threads": 1, "provider": "cuda"} | options))
        return pipes[-1]

    yield open_
    for pipe in pipes:
        pipe.close()


@pytest.fixture
def stays(handmade, monkeypatch):
    """Opens a kind's bundle on engines whose arrays are NumPy's: the same loop, without a device."""

    @contextmanager
    def open_(kind: str = "labels") -> Iterator[Pipeline]:
        with monkeypatch.context() as patch:
            patch.setattr(ort, "OrtEngine", Host)
            with Pipeline.load(handmade(kind), threads=1) as pipe:
                yield pipe

    return open_


@pytest.fixture
def engine(runtime, handmade):
    """Opens a stage of the bundle that takes labels."""

    def open_(stage: str = "denoiser", **options: object) -> ort_cuda.OrtCudaEngine:
        folder = handmade("labels")
        return ort.open([folder / f"{stage}.onnx"], Options(**{"threads": 1, "provider": "cuda"} | options))

    return open_
