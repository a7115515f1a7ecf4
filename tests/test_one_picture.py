"""One picture per seed: the same bits whatever the batch, its other samples, the threads, and what ran before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dit_export.verify.inputs import grouped
from dit_runtime import Pipeline
from dit_runtime.bundle import manifest
from dit_runtime.bundle.records import GUIDANCE

LABEL, SEED, STRENGTH, STEPS = 207, 3, 4.0, 3
cases = pytest.mark.parametrize(
    ("backend", "precision"), [(name, kind) for name in ("onnxruntime", "openvino") for kind in ("fp32", "int8")]
)


@pytest.fixture
def bundle(shared_embedders, narrow, tmp_path, tmp_path_factory, monkeypatch) -> Callable[[str, str], Path]:
    """A bundle of the same network in a precision, for a backend."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))  # each shape is compiled once

    def make(backend: str, precision: str) -> Path:
        if precision == "int8":
            return narrow("int8", backend)
        if backend == "onnxruntime":
            return shared_embedders.bundle
        folder = Path(shutil.copytree(shared_embedders.bundle, tmp_path / "bundle"))
        contract = manifest.read(folder)
        manifest.write(folder, replace(contract, stages=tuple(replace(s, backend=backend) for s in contract.stages)))
        return folder

    return make


def draw(pipe: Pipeline, *others: tuple[int, int, float], guidance: float = STRENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Return the sample's latents and its picture, drawn beside others of a label, a seed and a guidance each."""
    samples = [*others, (LABEL, SEED, guidance)]
    labels, seeds, weights = (list(column) for column in zip(*samples, strict=True))
    latents = pipe.sample(labels, seed=seeds, guidance=weights, steps=STEPS, output="latents")
    pictures = pipe.engines.decode(latents)
    return latents[-1], pictures[-1]


def same(first: tuple[np.ndarray, ...], second: tuple[np.ndarray, ...]) -> bool:
    return all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


@cases
def test_a_sample_beside_others(bundle, backend, precision) -> None:
    folder = bundle(backend, precision)
    with Pipeline.load(folder, threads=1) as pipe:
        alone = draw(pipe)
        assert same(draw(pipe, (360, 4, 1.5)), alone)
        assert same(draw(pipe, (999, 5, -40.0)), alone)  # whose activations are far larger
        assert not same(draw(pipe, guidance=1.5), alone)
    with Pipeline.load(folder, threads=1) as pipe:  # the batch first
        assert same(draw(pipe, (360, 4, 1.5)), alone) and same(draw(pipe), alone)


@cases
def test_history(bundle, backend, precision) -> None:
    folder = bundle(backend, precision)
    with Pipeline.load(folder, threads=1) as pipe:
        alone = draw(pipe)
    with Pipeline.load(folder, threads=1) as pipe:
        pipe.sample([1, 2], seed=1, guidance=1.0, steps=2)
        pipe.sample([1, 2], seed=1, steps=2)
        assert same(draw(pipe), alone)


@cases
def test_threads(bundle, backend, precision) -> None:
    folder, drawn = bundle(backend, precision), []
    for threads in (1, 2):
        with Pipeline.load(folder, threads=threads) as pipe:
            drawn.append(draw(pipe))
    assert same(*drawn)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux says which cores a thread may use")
def test_no_thread_is_tied_to_a_core(bundle) -> None:
    before = {*Path("/proc/self/task").iterdir()}
    with Pipeline.load(bundle("openvino", "int8"), threads=2) as pipe:
        draw(pipe)
        threads = {*Path("/proc/self/task").iterdir()} - before
        cores = {frozenset(os.sched_getaffinity(int(thread.name))) for thread in threads}
        assert cores == {frozenset(os.sched_getaffinity(0))}


@cases
def test_a_warmed_pipeline(bundle, backend, precision) -> None:
    folder, drawn = bundle(backend, precision), []
    for warm in ((), (1,)):
        with Pipeline.load(folder, threads=1, warm=warm) as pipe:
            drawn.append(draw(pipe))
    assert same(*drawn)


@cases
def test_rows_of_other_timesteps(bundle, backend, precision) -> None:
    """As a service batches the steps of several runs."""
    with Pipeline.load(bundle(backend, precision), threads=1) as pipe:
        contract = pipe.manifest
        state = np.random.default_rng(0).normal(size=(2, *contract.state.shape)).astype(np.float32)
        times, labels = np.array([40, 900], np.float32), {"labels": np.array([LABEL, 360])}
        weights, null = np.array([STRENGTH, 1.5], np.float32), {"labels": np.array([1000])}

        def denoise(rows: slice) -> np.ndarray:
            own = {name: values[rows] for name, values in labels.items()}
            inputs = grouped(pipe.engines, times[rows], own, null)
            answer = pipe.engines.run(contract.step, {"latents": state[rows], GUIDANCE: weights[rows], **inputs})
            return np.concatenate([answer["prediction"], answer["variance"]], axis=1)

        both = denoise(slice(0, 2))
        for row in (0, 1):
            assert np.array_equal(denoise(slice(row, row + 1))[0], both[row])


@cases
def test_an_unguided_sample_beside_guided_ones(bundle, backend, precision) -> None:
    with Pipeline.load(bundle(backend, precision), threads=1) as pipe:
        assert same(draw(pipe, (360, 4, 4.0), guidance=1.0), draw(pipe, guidance=1.0))
