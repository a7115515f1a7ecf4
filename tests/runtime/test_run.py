"""Runs that a batcher steps: what they ask, in shared calls of the step stage, and the bits that this gives."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from dit_runtime import EngineError, Pipeline, Request, UsageError
from dit_runtime.backends import ort
from tests.runtime.test_loops import WHOLE, Host

# They differ in all that a run may have of its own.
REQUESTS = [
    Request([1], steps=4, guidance=3.0, solver="ddim", seed=1),
    Request([2, 0], steps=7, guidance=[1.5, 1.0], solver="ddpm", seed=[2, 3]),
    Request([4], steps=5, guidance=1.0, solver="dpm++", seed=4),
    Request([3], steps=2, guidance=6.0, solver="dpm++3", seed=5),
    Request([3, 3], steps=6, guidance=1.0, solver="ddim", spacing="respaced", eta=0.5, seed=6),
]


class RowByRow:
    """The step stage's engine, which evaluates each sample alone: so a sample's bits cannot depend on its batch."""

    def __init__(self, engine, calls: list[tuple[int, int]]) -> None:
        self.engine, self.io, self.calls, self.close = engine, engine.io, calls, lambda: None

    def run(self, inputs):
        count = len(inputs["latents"])
        self.calls.append((len(inputs["conditioning"]), count))
        grouped = {"conditioning"}
        rows = [
            {name: values[:, i : i + 1] if name in grouped else values[i : i + 1] for name, values in inputs.items()}
            for i in range(count)
        ]
        made = [self.engine.run(row) for row in rows]
        return {name: np.concatenate([part[name] for part in made]) for name in made[0]}


@pytest.fixture
def calls() -> list[tuple[int, int]]:
    return []


@pytest.fixture
def pipe(opened, calls) -> Pipeline:
    pipe = opened("labels")
    engines = pipe.engines.opened | {"denoiser": RowByRow(pipe.engines.opened["denoiser"], calls)}
    return Pipeline(pipe.folder, pipe.manifest, engines)


def step_together(pipe: Pipeline, runs: list) -> None:
    """Go a step of each run; those of one number of groups share a call."""
    together = defaultdict(list)
    for run in runs:
        ask = run.ask()
        if ask is None:
            run.tell()
        else:
            together[len(ask.numbers)].append((run, ask))
    for pairs in together.values():
        inputs = [ask.inputs(slice(None)) for _, ask in pairs]
        stacked = {
            name: np.concatenate([own[name] for own in inputs], axis=0 if name == "guidance" else 1)
            for name in inputs[0]
        }
        state = np.concatenate([ask.state for _, ask in pairs]).astype(np.float32)
        answer = pipe.engines.run(pipe.manifest.step, {"latents": state, **stacked})
        first = 0
        for run, ask in pairs:
            own = slice(first, first := first + len(ask.state))
            run.tell(answer["prediction"][own], answer["variance"][own])


def test_runs_that_share_calls_have_the_bits_of_runs_alone(pipe, calls) -> None:
    """Runs join and leave between steps."""
    alone = [pipe.run(request).result() for request in REQUESTS]
    calls.clear()
    waiting, active, ended = [pipe.run(request, host=True) for request in REQUESTS], [], []
    while waiting or active:
        active += [waiting.pop(0)] if waiting else []
        step_together(pipe, active)
        ended += [run for run in active if run.done == run.steps]
        active = [run for run in active if run.done < run.steps]
    assert {groups for groups, _ in calls} == {1, 2} and max(count for _, count in calls) >= 3
    by_steps = {run.steps: run for run in ended}
    for request, expected in zip(REQUESTS, alone, strict=True):
        run = by_steps[request.steps]
        assert np.array_equal(run.result(), expected) and not run.step() and run.ask() is None and not run.tell()
        guided = bool((np.asarray(request.guidance) != 1).any())
        assert run.rows == run.planned_rows == run.steps * (2 if guided else 1)


def test_what_a_run_asks(pipe) -> None:
    run = pipe.run(Request([2, 0], steps=3, guidance=2.0, spacing="respaced", seed=1), host=True)
    ask = run.ask()
    assert (ask.step, ask.time, ask.state.shape) == (0, 999.0, (2, 2, 4, 4)) and (ask.weights == 2).all()
    read = {name: rows[ask.numbers] for name, rows in ask.rows.items()}
    assert read["labels"].tolist() == [[2, 0], [5, 5]]
    assert np.array_equal(run.ask().state, ask.state) and run.done == 0  # to ask changes nothing
    one, both = ask.inputs(slice(1, 2)), ask.inputs(slice(None))
    assert one["conditioning"].shape == (2, 1, 2, 8) and np.array_equal(
        one["conditioning"], both["conditioning"][:, 1:]
    )
    bad = np.full(ask.state.shape, np.nan, np.float32)
    with pytest.raises(EngineError, match=r"step 1 \(t = 999\)"):
        run.tell(bad, bad)
    with pytest.raises(UsageError, match="got no prediction"):
        run.tell()
    assert run.done == run.rows == 0 and np.array_equal(run.ask().state, ask.state)


def test_an_interval_stays_on_the_device(bundle, monkeypatch) -> None:
    """Steps of one group and of two, in any order; policies and caches take the solver on the host, to the bit."""
    fields = {"steps": 8, "solver": "dpm++", "seed": 1, "guidance": 3.0, "output": "latents"}
    cases = [
        {"guidance_interval": (0.3, 0.6)},
        {"guidance_policy": "apg"},
        {"guidance_interval": (0.3, 0.6), "cache": "taylorseer"},
    ]
    with Pipeline.load(bundle, threads=1) as pipe:
        expected = [pipe.sample([1, 2, 3, 4], **fields, **case) for case in cases]
    monkeypatch.setattr(ort, "OrtEngine", Host)
    with Pipeline.load(bundle, threads=1) as pipe:
        runs = [pipe.run(Request([1, 2, 3, 4], **fields, **case)) for case in cases]
        got = [run.result() for run in runs]
    assert 0 < np.linalg.norm(got[0] - expected[0]) <= WHOLE * np.linalg.norm(expected[0])
    assert np.array_equal(got[1], expected[1]) and np.array_equal(got[2], expected[2])
    assert runs[0].rows == runs[0].planned_rows == 10 and runs[1].rows == 16 and runs[2].rows < 10


def test_a_run_on_a_device_asks_nothing(bundle, monkeypatch) -> None:
    """On the host, the same engine gets arrays of the host, and the solver makes each state."""
    monkeypatch.setattr(ort, "OrtEngine", Host)
    request = Request([1, 2], steps=4, solver="dpm++", seed=1, output="latents")
    with Pipeline.load(bundle, threads=1) as pipe:
        run = pipe.run(request)
        with pytest.raises(UsageError, match="host=True"):
            run.ask()
        expected, host = run.result(), pipe.run(request, host=True)
        assert run.rows == run.planned_rows == 8
        while host.done < host.steps:
            step_together(pipe, [host])
        assert 0 < np.linalg.norm(host.result() - expected) <= WHOLE * np.linalg.norm(expected)
