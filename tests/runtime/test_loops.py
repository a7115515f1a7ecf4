"""The loop of matrices beside the loop of the solver: as numbers, and as the bundle's update graph on ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dit_runtime import EngineError, Pipeline, Request
from dit_runtime.backends import Options, ort
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from dit_runtime.sampling.noise import Noise
from dit_runtime.sampling.process import NOISE_SOLVERS, Process, Sampler
from dit_runtime.sampling.solvers import linear, solve

STEPWISE = 1e-6  # a step's coefficients, state and sum in float32, 6e-8 each; with α = 0.006 x₀ is a difference of 156s
WHOLE = 1e-4  # 25 of them, each through the network; measured 4e-7
LINEAR = [("epsilon", solver) for solver in ("ddim", "dpm++1", "dpm++")]
LINEAR += [("v_prediction", "ddim"), ("sample", "dpm++"), ("velocity", "euler"), ("velocity", "heun")]
LINEAR += [("velocity", "dpm++1"), ("velocity", "dpm++"), ("epsilon", "unipc1"), ("velocity", "unipc1")]


class Host(ort.OrtEngine):
    """An engine whose arrays stay with it, which for a CPU is where they are."""

    uploads = 0

    def put(self, values):
        Host.uploads += 1
        return np.array(values)

    def empty(self, shape, dtype):
        return np.empty(shape, dtype)

    def run(self, inputs, into=None):
        made = super().run(inputs)
        for name, target in (into or {}).items():
            target[...] = made[name]
        return made if into is None else {}


@pytest.fixture
def stays(monkeypatch):
    """Arrays stay with the engines of pipelines that are opened from here on."""

    def use() -> None:
        monkeypatch.setattr(ort, "OrtEngine", Host)
        monkeypatch.setattr(Host, "uploads", 0)

    return use


def no_noise(shape):
    raise AssertionError("a solver without noise drew some")


def states(process, solver, steps, **options):
    """Yield x, the prediction and x' of each step of the solver. The predictions bend the state."""
    waves = Noise(1).normal((2 * steps, 64))
    run = solve(process, solver, steps, Noise(0).normal((64,)), no_noise, **options)
    x, _ = next(run)
    for wave in waves:
        prediction = np.tanh(x) + 0.1 * wave
        try:
            after, _ = run.send((prediction, None))
        except StopIteration as end:
            yield x, prediction, end.value
            return
        yield x, prediction, after
        x = after


@pytest.mark.parametrize(("prediction", "solver"), LINEAR)
@pytest.mark.parametrize("steps", [2, 10, 25, 250])
def test_the_matrices_are_the_solver(prediction, solver, steps) -> None:
    for kind in ("midpoint", "heun"):
        process = Process(prediction=prediction, sampler=Sampler(solver=solver, solver_type=kind))
        matrices = linear(process, solver, steps)
        previous = np.zeros(64)
        asked = 0
        for matrix, (x, output, after) in zip(matrices, states(process, solver, steps), strict=True):
            previous, made = matrix @ np.stack([x, output, previous])
            # Both in float64; what is kept at α = 0.006 is a difference of numbers 156 times as large. Measured 4e-14.
            assert np.linalg.norm(made - after) <= 1e-11 * np.linalg.norm(after)
            asked += 1
        assert asked == len(matrices) == (2 * steps if solver == "heun" else steps)


@pytest.mark.parametrize(
    "spacing", ["leading", "trailing", "linspace", "karras", "999, 800, 600, 400, 300, 200, 9, 3, 1, 0"]
)
def test_spacings_have_matrices_of_their_own(spacing) -> None:
    process = Process()
    usual, other = linear(process, "dpm++", 10, spacing="respaced"), linear(process, "dpm++", 10, spacing=spacing)
    assert np.abs(usual - other).max() > 1e-3


def test_ddim_is_the_first_order_solver() -> None:
    """A fact of the papers that no code of ours knows: equal spacings give equal matrices, and look back at nothing."""
    process = Process()
    ddim, first = (linear(process, solver, 10, spacing="leading") for solver in ("ddim", "dpm++1"))
    shifted = linear(replace(process, sampler=Sampler(steps_offset=0)), "dpm++", 10, spacing="leading")
    assert np.abs(first[:, :, 2]).max() < 1e-12 < 0.01 < np.abs(shifted[:, 1, 2]).max()
    assert ddim.shape == first.shape == (10, 2, 3)
    assert np.abs(ddim[:, :, 2]).max() < 1e-12


@pytest.mark.parametrize(
    ("solver", "options", "sampler"),
    [
        ("ddpm", {}, {}),
        ("ddpm", {}, {"variance": "fixed_small"}),
        ("ddim", {"eta": 0.5}, {}),
        ("ddim", {}, {"clip_sample": True}),
        ("ddim", {}, {"clip_sample": True, "clip_sample_range": 100.0}),
        ("dpm++3", {}, {}),
        ("sde-dpm++1", {}, {}),
        ("unipc", {}, {}),
        ("deis", {}, {}),
    ],
)
def test_what_has_no_matrices(solver, options, sampler) -> None:
    assert linear(Process(sampler=Sampler(**sampler)), solver, 10, **options) is None


def test_noise_along_a_velocity_has_no_matrices() -> None:
    assert linear(Process(prediction="velocity", sampler=Sampler(solver="euler")), "sde", 10) is None


def test_what_the_solver_refuses_is_refused() -> None:
    with pytest.raises(UsageError, match="only ddim takes it"):
        linear(Process(), "dpm++", 10, eta=0.5)
    assert {solver for _, solver in LINEAR} - {"euler", "heun"} <= set(NOISE_SOLVERS)


def of_process(folder, prediction: str, solver: str):
    """The same graphs, as what another process predicts."""
    contract = manifest.read(folder)
    process = replace(contract.process, prediction=prediction, sampler=Sampler(solver=solver))
    manifest.write(folder, replace(contract, process=process))
    return folder


@pytest.mark.parametrize(
    ("prediction", "solver"),
    [("epsilon", "ddim"), ("epsilon", "dpm++"), ("velocity", "euler"), ("velocity", "heun"), ("velocity", "dpm++")],
)
def test_both_loops_draw_the_same(bundle, stays, prediction, solver) -> None:
    """25 steps from one noise, each compared; more samples than a batch, with a last one that is smaller."""
    of_process(bundle, prediction, solver)
    runs: dict[str, list[np.ndarray]] = {}
    for kind in ("solver", "matrices"):
        if kind == "matrices":
            stays()
        runs[kind] = steps = []
        with Pipeline.load(bundle, threads=1) as pipe:
            options = {"steps": 25, "guidance": [3.0, 1.0, 2.0, 4.0, 5.0], "solver": solver, "seed": 2}
            watch = lambda step, total, x, steps=steps: steps.append(x)  # noqa: E731
            final = pipe.sample([1, 3, 0, 4, 3], **options, output="latents", on_step=watch)
        np.testing.assert_array_equal(final, steps[-1].astype(np.float32))
    assert len(runs["solver"]) == len(runs["matrices"]) == (50 if solver == "heun" else 25) and Host.uploads > 0
    errors = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(runs["solver"], runs["matrices"], strict=True)]
    assert errors[0] <= STEPWISE and max(errors) <= WHOLE and max(errors) > 0  # not the same loop twice


@pytest.mark.parametrize("stage", ["denoiser", "update"])
def test_a_step_that_failed_on_a_device_can_be_tried_again(bundle, stays, monkeypatch, stage) -> None:
    """The second part of a batch fails, and the first, which has gone this step, does not go it twice."""
    stays()
    request = Request([1, 3, 0, 4, 3], steps=5, seed=2, solver="dpm++", output="latents")
    with Pipeline.load(bundle, threads=1) as pipe:
        expected = pipe.run(request).result()
        run, engine, calls = pipe.run(request), pipe.engines.opened[stage], []
        work = engine.run

        def failing(inputs, into=None):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("out of memory")
            return work(inputs, into)

        monkeypatch.setattr(engine, "run", failing)
        assert run.step()
        with pytest.raises(EngineError, match="out of memory"):
            run.step()
        np.testing.assert_array_equal(run.result(), expected)


def test_each_step_alone(bundle, stays) -> None:
    """Each step starts from the solver's own state and runs the graph that ships. A matrix of another step is
    detected."""
    contract = manifest.read(bundle)
    update = ort.open([bundle / name for name in contract.update.files], Options(threads=1))
    shape = (4, *contract.state.shape)
    matrices = linear(contract.process, "dpm++", 25)
    run = solve(contract.process, "dpm++", 25, Noise(0).normal(shape), no_noise)
    x, _ = next(run)
    previous = np.zeros(shape, np.float32)
    missed = []
    for index, wave in enumerate(Noise(1).normal((25, *shape))):
        prediction = (0.8 * x + 0.3 * wave).astype(np.float32)
        states = {"latents": x.astype(np.float32), "prediction": prediction, "previous": previous}
        try:
            after, _ = run.send((prediction, None))
        except StopIteration as end:
            after = end.value
        made, other = (
            update.run(states | {"coefficients": matrices[i].astype(np.float32)}) for i in (index, index - 1)
        )
        assert np.linalg.norm(made["next"] - after) <= STEPWISE * np.linalg.norm(after)
        missed.append(np.linalg.norm(other["next"] - after) / np.linalg.norm(after))
        x, previous = after, made["kept"]
    assert min(missed) > 100 * STEPWISE


def test_what_draws_noise_takes_the_solver(bundle, stays) -> None:
    options = {"steps": 5, "solver": "ddim", "eta": 0.5, "seed": 1, "output": "latents"}
    with Pipeline.load(bundle, threads=1) as pipe:
        expected = pipe.sample([3, 4], **options)
    stays()
    with Pipeline.load(bundle, threads=1) as pipe:
        np.testing.assert_array_equal(pipe.sample([3, 4], **options), expected)


def test_a_step_that_is_not_finite_is_named(bundle, stays) -> None:
    stays()
    options = {"steps": 5, "guidance": 3e38, "output": "latents"}
    with Pipeline.load(bundle, threads=1) as pipe:
        with pytest.raises(EngineError, match="step 1 or one before: the state holds values that are not finite"):
            pipe.sample([3], **options, on_step=lambda *_: None)
        with pytest.raises(EngineError, match="step 5 or one before"):
            pipe.sample([3], **options)
