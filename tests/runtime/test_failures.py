"""Runs that are stopped or whose engines fail: what is said, and what can be tried again."""

from __future__ import annotations

import numpy as np
import pytest

from dit_runtime import EngineError, Pipeline, Request, Stopped
from tests.runtime.watched import LABELS, WatchedEngine, failing, latents, watch_denoiser, with_stage


def test_on_step_stops_the_run(pipe):
    calls = []
    record = watch_denoiser(pipe, lambda _: calls.append(1))
    with pytest.raises(Stopped, match="2 of 5"):
        latents(record, [1], on_step=lambda step, *_: step == 2)
    assert len(calls) == 2
    assert len(latents(pipe, [1], on_step=lambda *_: 1)) == 1  # only True itself stops: a count returned does not


def test_a_run_that_is_cancelled(pipe):
    run = pipe.run(Request([1], steps=5))
    assert run.step() and run.step() and (run.done, run.steps) == (2, 5)
    state = run.state
    run.cancel()
    for more in (run.step, run.result, run.step):
        with pytest.raises(Stopped, match="stopped after step 2 of 5"):
            more()
    assert np.array_equal(run.state, state) and run.done == 2


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++"])
def test_a_step_that_failed_can_be_tried_again(pipe, solver):
    """In a batch of two parts, so that the first part of a step succeeds before the second fails."""
    request = Request(LABELS[:5], steps=5, seed=3, solver=solver, output="latents")
    run = watch_denoiser(pipe, failing(4)).run(request)
    assert run.step()
    state = run.state
    with pytest.raises(EngineError, match="the denoiser's engine failed: out of memory"):
        run.step()
    assert run.done == 1 and np.array_equal(run.state, state)
    assert np.array_equal(run.result(), pipe.run(request).result())


@pytest.mark.parametrize("which", [1, 2])
def test_a_stage_before_the_loop_that_failed_runs_again(pipe, which):
    request = Request(LABELS, steps=3, output="latents")
    engine = WatchedEngine(pipe.engines.opened["conditioner"], failing(which))
    run = with_stage(pipe, "conditioner", {"conditioner": engine}, max_batch=2).run(request)
    with pytest.raises(EngineError, match="the conditioner's engine failed: out of memory"):
        run.step()
    assert np.array_equal(run.result(), pipe.run(request).result())


def test_an_output_of_another_shape_is_refused(pipe):
    """Else NumPy would stretch it over the batch."""
    engine = pipe.engines.opened["denoiser"]
    small = WatchedEngine(engine, lambda _: None, lambda outputs: outputs | {"prediction": np.zeros((1, 1, 1, 1))})
    broken = Pipeline(pipe.folder, pipe.manifest, pipe.engines.opened | {"denoiser": small})
    words = r"the denoiser's prediction has shape \[1, 1, 1, 1\], expected \[2, 2, 4, 4\]"
    with pytest.raises(EngineError, match=words):
        latents(broken, [1, 2])
    engine = pipe.engines.opened["conditioner"]
    short = WatchedEngine(engine, lambda _: None, lambda outputs: {"conditioning": outputs["conditioning"][:1]})
    broken = Pipeline(pipe.folder, pipe.manifest, pipe.engines.opened | {"conditioner": short})
    with pytest.raises(EngineError, match=r"the conditioner's conditioning has shape \[1, 2, 8\], expected \["):
        latents(broken, [1, 2])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("step", [1, 4])
def test_a_prediction_that_is_not_finite_names_the_step(pipe, value, step):
    calls = []

    def spoil(outputs):
        calls.append(1)
        if len(calls) == step:
            outputs["prediction"][0, 0, 0, 0] = value
        return outputs

    engine = WatchedEngine(pipe.engines.opened["denoiser"], lambda _: None, spoil)
    broken = Pipeline(pipe.folder, pipe.manifest, pipe.engines.opened | {"denoiser": engine})
    with pytest.raises(EngineError, match=f"step {step} "):
        latents(broken, [1])
    assert len(calls) == step


def test_an_engine_that_fails_is_named(pipe):
    def fail(inputs):
        raise RuntimeError("out of memory\nand where in its source")

    engine = WatchedEngine(pipe.engines.opened["denoiser"], fail)
    broken = Pipeline(pipe.folder, pipe.manifest, pipe.engines.opened | {"denoiser": engine})
    with pytest.raises(EngineError, match=r"^the denoiser's engine failed: out of memory$"):
        latents(broken, [1])
