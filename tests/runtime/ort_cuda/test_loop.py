"""The sampling loop on the provider's device: its bits, what crosses, what is recorded, what is given back."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest

from dit_runtime import EngineError, Pipeline, Request, verify
from dit_runtime.backends import ort_cuda
from dit_runtime.conditions.memo import Memo
from dit_runtime.errors import Stopped
from dit_runtime.sampling.noise import Noise

LABELS = [1, 3, 0, 4, 3]  # more than the three rows that an engine takes
OPTIONS = {"steps": 25, "guidance": 3.0, "seed": 2, "output": "latents"}
UP, HOME = 1, 2
FREE_RUN = 1e-4  # as the tests of the loop of matrices
CONDITIONS = {
    "labels": {"labels": LABELS},
    "captioned": {
        "condition": {"captions": Noise(1).normal((5, 5, 3))},
        "negative": {"captions": Noise(1).normal((1, 5, 3))},
    },
    "wave": {"condition": {"words": Noise(1).normal((5, 3, 4)), "pooled": Noise(2).normal((5, 5))}},
}


def request(kind: str, **options: object) -> dict:
    return OPTIONS | CONDITIONS[kind] | options


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("window", [None, 1], ids=["all steps", "a step"])
def test_the_bits_of_the_host(on_gpu, stays, monkeypatch, kind, window) -> None:
    """25 steps of five samples in parts of three and two, each step looked at; memos of all steps and of one."""
    if window is not None:
        monkeypatch.setitem(Memo.__init__.__kwdefaults__, "budget", window)
    steps: dict[str, list[np.ndarray]] = {"host": [], "gpu": []}
    with stays(kind) as pipe:
        pipe.sample(**request(kind), on_step=lambda *event: steps["host"].append(event[2]))
    on_gpu(kind).sample(**request(kind), on_step=lambda *event: steps["gpu"].append(event[2]))
    assert len(steps["host"]) == len(steps["gpu"]) > 24
    for mine, theirs in zip(steps["gpu"], steps["host"], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_the_pictures_of_the_cpu(opened, on_gpu) -> None:
    options = request("labels", output="images")
    differences = np.abs(on_gpu().sample(**options).astype(int) - opened().sample(**options))
    assert differences.max() <= 1
    latents = [pipe.sample(**request("labels")) for pipe in (on_gpu(), opened())]
    assert 0 < np.linalg.norm(latents[0] - latents[1]) <= FREE_RUN * np.linalg.norm(latents[1])


def test_a_built_bundle(shared_embedders, runtime) -> None:
    """Attention in the denoiser, the provider's own form of the decoder: verified against PyTorch's reference run."""
    with Pipeline.load(shared_embedders.bundle, threads=1, provider="cuda") as pipe:
        figures = verify.verify(pipe)
    assert all(figure.passed for figure in figures) and {"denoiser", "run"} <= {figure.stage for figure in figures}
    opened = {session.path.name for session in runtime.sessions}
    assert {"denoiser.onnx", "decoder.onnxruntime-cuda.onnx"} <= opened


def test_the_loop_of_the_solver(opened, on_gpu) -> None:
    """A solver that draws noise works on the host; the engine is the same."""
    options = request("labels", solver="ddim", eta=0.5)
    np.testing.assert_array_equal(on_gpu().sample(**options), opened().sample(**options))


@pytest.mark.parametrize("kind", CONDITIONS)
def test_only_the_state_comes_home(on_gpu, device, kind) -> None:
    """The tables that are made before the loop do not: their engines write them where they are read."""
    pipe = on_gpu(kind)
    pipe.sample(**request(kind))
    state = 4 * math.prod(pipe.manifest.state.shape)
    assert {size for way, size in device.copied if way == HOME} == {3 * state, 2 * state}


def test_nothing_crosses_in_a_step(on_gpu, device) -> None:
    pipe, crossed = on_gpu(), []
    for steps in (2, 10):
        device.copied.clear()
        pipe.sample(LABELS, **OPTIONS | {"steps": steps})
        before = {4 * rows for rows in range(1, 4)} | {8 * rows for rows in range(1, 4)}  # what the conditioner reads
        ignored = before | {4 * steps * 2 * 3}  # and the matrices
        crossed.append({key: n for key, n in device.copied.items() if key[0] in (UP, HOME) and key[1] not in ignored})
    assert crossed[0] == crossed[1]
    device.copied.clear()
    pipe.sample(LABELS, **OPTIONS | {"steps": 10}, on_step=lambda *_: None)
    assert device.copied[HOME, 384] == device.copied[HOME, 256] == 10 + 1


def test_a_graph_a_shape(on_gpu, runtime) -> None:
    """A shape runs once, is recorded in its second run, and replayed from then on."""
    pipe = on_gpu()
    pipe.sample(LABELS, **OPTIONS)
    session = pipe.engines.opened["denoiser"]._session
    assert session.runs == ["-1", "-1"] + 24 * ["1", "2"] and sorted(session.recorded) == ["1", "2"]
    pipe.sample(LABELS, **OPTIONS | {"guidance": 1.0})  # one group instead of two
    pipe.sample(LABELS, **OPTIONS)
    assert sorted(session.recorded) == ["1", "2", "3", "4"] and session.runs.count("-1") == 4
    assert len({session.options["user_compute_stream"] for session in runtime.sessions}) == 1  # all in one order


def test_only_the_last_shapes_keep_their_memory(on_gpu, device, monkeypatch) -> None:
    monkeypatch.setattr(ort_cuda, "SHAPES", 2)
    pipe = on_gpu()
    session = pipe.engines.opened["denoiser"]._session
    expected = pipe.sample(LABELS, **OPTIONS)  # parts of three and of two
    gc.collect()
    held = len(device.open)
    pipe.sample(LABELS[:1], **OPTIONS)
    assert sorted(session.recorded) == ["2", "3"]
    np.testing.assert_array_equal(pipe.sample(LABELS, **OPTIONS), expected)
    assert sorted(session.recorded) == ["4", "5"]
    gc.collect()
    assert len(device.open) == held


def test_without_graphs_where_the_provider_cannot_record(on_gpu, stays, runtime, capsys) -> None:
    with stays() as pipe:
        expected = pipe.sample(LABELS, **OPTIONS)
    runtime.records = False
    np.testing.assert_array_equal(on_gpu().sample(LABELS, **OPTIONS), expected)
    assert "it runs without: operation not permitted when stream is capturing" in capsys.readouterr().err
    runtime.graphs = False
    np.testing.assert_array_equal(on_gpu().sample(LABELS, **OPTIONS), expected)
    said = capsys.readouterr().err
    assert "it runs without: This session cannot use the graph capture feature as requested by the user\n" in said
    assert runtime.sessions[-1].options["enable_cuda_graph"] == "0" and set(runtime.sessions[-1].runs) == {"-1"}


@pytest.mark.parametrize("stage", ["conditioner", "denoiser", "update"])
def test_a_step_that_failed_can_be_tried_again(on_gpu, monkeypatch, stage) -> None:
    """Also in the middle of a table, and where the first part of a batch has gone the step already."""
    pipe = on_gpu()
    expected = pipe.sample(LABELS, **OPTIONS)
    run, session = pipe.run(Request(LABELS, **OPTIONS)), pipe.engines.opened[stage]._session
    work, calls = session.run_with_iobinding, []

    def failing(binding, settings) -> None:
        calls.append(1)
        if len(calls) in (4, 5):
            raise RuntimeError("out of memory")
        work(binding, settings)

    monkeypatch.setattr(session, "run_with_iobinding", failing)
    failures = 0
    while True:
        try:
            more = run.step()
        except EngineError as error:
            assert "out of memory" in str(error)
            failures += 1
        else:
            if not more:
                break
    assert failures == 2
    np.testing.assert_array_equal(run.result(), expected)


def test_a_run_that_is_cancelled(on_gpu, device) -> None:
    pipe = on_gpu()
    expected = pipe.sample(LABELS, **OPTIONS)
    gc.collect()
    before, run = len(device.open), pipe.run(Request(LABELS, **OPTIONS))
    for _ in range(3):
        run.step()
    assert np.isfinite(run.state).all() and len(device.open) > before
    run.cancel()
    with pytest.raises(Stopped):
        run.step()
    del run
    gc.collect()
    assert len(device.open) == before
    np.testing.assert_array_equal(pipe.sample(LABELS, **OPTIONS), expected)


def test_everything_is_given_back(on_gpu, device) -> None:
    pipe, after = on_gpu(), []
    for _ in range(2):
        pipe.sample(LABELS, **OPTIONS | {"output": "images"})
        gc.collect()
        after.append(len(device.open))
    assert after[0] == after[1]
    pipe.close()
    gc.collect()
    assert device.open == {}
    device.room = 5
    with pytest.raises(EngineError, match="cudaMalloc: cudaErrorMemoryAllocation"):
        on_gpu().sample(LABELS, **OPTIONS)


def test_low_memory_keeps_nothing(on_gpu, opened, device) -> None:
    pipe = on_gpu(low_memory=True)
    np.testing.assert_array_equal(pipe.sample(LABELS, **OPTIONS), opened(low_memory=True).sample(LABELS, **OPTIONS))
    assert [*pipe.engines.opened] == ["denoiser"]
    pipe.close()
    gc.collect()
    assert device.open == {}
