"""Memos: each key is made once, in windows below the budget, in calls that the engine takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dit_runtime.bundle.manifest import Stage, TensorSpec
from dit_runtime.conditions.memo import BUDGET, Memo, Source, StepInputs
from dit_runtime.sampling.noise import Noise

ROW = 24  # bytes of the fake stage's rows


class Fake:
    """A stage whose rows tell for which (timestep, label) they are, and a record of all calls."""

    stage = Stage(
        "conditioner",
        "time+condition",
        (TensorSpec("timesteps", "float32", ("rows",)), TensorSpec("labels", "int64", ("rows",))),
        (TensorSpec("conditioning", "float32", ("rows", 2, 3)),),
        "conditioner.onnx",
    )

    def __init__(self) -> None:
        self.calls: list[list[tuple[float, int]]] = []

    def __call__(self, stage, inputs):
        timesteps, labels = inputs["timesteps"], inputs["labels"]
        assert timesteps.dtype == np.float32 and labels.dtype == np.int64
        self.calls.append([*zip(timesteps.tolist(), labels.tolist(), strict=True)])
        rows = np.stack([timesteps, labels.astype(np.float32)], axis=1)
        return {"conditioning": np.repeat(rows[:, :, None], 3, axis=2)}  # (N, K = 2, D = 3)

    @property
    def pairs(self) -> list[tuple[float, int]]:
        return [pair for call in self.calls for pair in call]


def held_bytes(memo: Memo) -> int:
    """Memory of the arrays that the memo keeps, each counted by what it really holds on to."""
    bases = [array if array.base is None else array.base for array in memo._values.values()]
    return sum(base.nbytes for base in bases)


def make(fake: Fake, times: list[float], labels: list[int], max_rows: int = 8, **options) -> Memo:
    values, steps = np.array(labels), np.array(times, np.float32)
    sources = {
        "timesteps": Source(lambda time, rows: np.full(rows.shape, steps[time]), True, frozenset()),
        "labels": Source(lambda time, rows: values[rows], False, frozenset({"labels"})),
    }
    stage = replace(fake.stage, max_batch=max_rows)
    return Memo(stage, fake, sources, len(times), {"labels": values}, len(labels), **options)


def run(steps: int, labels: list[int], budget: int, max_rows: int = 8) -> tuple[Fake, int]:
    """Return the fake with its recorded calls, and the most bytes that were held."""
    fake, peak = Fake(), 0
    times = [float(t) for t in range(10 * steps, 0, -10)]
    memo = make(fake, times, labels, max_rows, budget=budget)
    for step, t in enumerate(times):
        for first in range(0, len(labels), 3):  # as a batch is split
            own = np.arange(len(labels))[first : first + 3]
            rows = memo.sources["conditioning"].at(step, np.stack([own, np.full_like(own, len(labels) - 1)]))
            assert rows.shape == (2, len(own), 2, 3) and (rows[:, :, 0] == t).all()
            assert rows[0, :, 1, 0].tolist() == labels[first : first + 3] and (rows[1, :, 1] == labels[-1]).all()
        peak = max(peak, held_bytes(memo))
    return fake, peak


@pytest.mark.parametrize("count", [1, 5, 64])
def test_a_memo_stays_within_its_budget(count) -> None:
    """64 different labels take as much memory as one, as long as one step of them fits."""
    distinct = count + 1
    budget = ROW * distinct * 3 + 5  # three steps and a bit: the window is not the run
    fake, peak = run(20, [*range(count), 99], budget)
    assert ROW * distinct <= peak <= budget
    assert len(fake.pairs) == len({*fake.pairs}) == 20 * distinct  # each pair once: nothing is made again or in vain


def test_a_default_budget_for_many_labels_of_the_largest_model() -> None:
    """XL/2 at 50 guided steps is 78 MB a label: one label fits whole, and 64 do not get 64 times that."""
    row_bytes = 4 * 170 * 1152
    assert 50 * 2 * row_bytes < BUDGET < 64 * 50 * row_bytes


def test_a_step_larger_than_the_budget_is_still_made() -> None:
    """A window is at least one step; the memory of a single step cannot be saved."""
    fake, peak = run(4, [*range(10), 99], budget=1)
    assert peak == 11 * ROW and len(fake.pairs) == 44


def test_calls_are_no_larger_than_the_engine_takes() -> None:
    """Whoever asks, a profile of TensorRT ends at max_batch."""
    fake, _ = run(10, [*range(7), 99], budget=10**6, max_rows=5)
    assert max(map(len, fake.calls)) == 5 and len(fake.calls) == 80 // 5


def test_equal_rows_are_made_once() -> None:
    fake, _ = run(6, [3, 3, 7, 3, 7, 99], budget=10**6)
    assert sorted({*fake.pairs}) == sorted(fake.pairs) and len(fake.pairs) == 6 * 3


def test_a_whole_memo_over_budget_is_a_file() -> None:
    for budget, behind in ((10_000, type(None)), (100, np.memmap)):
        fake = Fake()
        memo = make(fake, [30.0, 20.0, 10.0], [4, 7, 9], 4, budget=budget, whole=True)
        rows = [memo.at("conditioning", step, np.array([[0, 1], [2, 2]])) for step in (1, 0, 2)]
        assert len(fake.pairs) == 9 and len(fake.calls) == 3  # every pair once, whichever step is first
        assert type(memo._values["conditioning"].base) is behind
        for values, t in zip(rows, (20, 30, 10), strict=True):
            np.testing.assert_array_equal(values[:, :, 0, 0], t)
            np.testing.assert_array_equal(values[:, :, 1, 0], [[4, 7], [9, 9]])


def test_what_was_asked_for_twice_is_made_again_only_outside_the_window() -> None:
    fake = Fake()
    memo = make(fake, [30.0, 20.0, 10.0], [4], budget=2 * ROW)  # two steps
    for step in (0, 1, 0, 1):
        memo.at("conditioning", step, np.array([0]))
    assert len(fake.pairs) == 2
    assert memo.at("conditioning", 2, np.array([0]))[0, 0, 0] == 10 and len(fake.pairs) == 3
    assert memo.at("conditioning", 0, np.array([0]))[0, 0, 0] == 30 and len(fake.pairs) == 5


def test_rows_of_many_timesteps_at_once() -> None:
    """As another stage reads them, and as a check asks for them in any order, through windows of one step and more."""
    for steps in (1, 2, 3):
        memo = make(Fake(), [30.0, 20.0, 10.0], [4, 7], budget=steps * 2 * ROW)
        for times in ([0, 0, 1, 2, 2], [2, 0, 1, 1, 0], [1, 2, 0, 2, 1]):
            rows = memo.sources["conditioning"].take(np.array(times), np.array([0, 1, 1, 0, 1]))
            labels = [4, 7, 7, 4, 7]
            assert rows[:, :, 0].tolist() == [[30 - 10 * t, label] for t, label in zip(times, labels, strict=True)]


class Counted:
    """A bundle's stages, and how many rows each was run for."""

    def __init__(self, pipe) -> None:
        self.run, self.rows = pipe.engines.run, dict.fromkeys((stage.name for stage in pipe.manifest.before_loop), 0)

    def __call__(self, stage, inputs):
        self.rows[stage.name] += len(next(iter(inputs.values())))
        return self.run(stage, inputs)


@pytest.mark.parametrize("budget", [1, BUDGET])
@pytest.mark.parametrize("whole", [False, True])
def test_each_stage_runs_once_per_what_it_depends_on(opened, budget, whole) -> None:
    pipe = opened("wave")
    counted = Counted(pipe)
    words, pooled = Noise(1).normal((4, 3, 4)), Noise(2).normal((4, 5))
    words[1], pooled[1], pooled[2] = words[0], pooled[0], pooled[0]
    rows = {"words": words, "words_mask": np.ones((4, 3), np.float32), "pooled": pooled}
    times = np.array([900.0, 500, 500, 100])  # one of them twice, as Heun's method asks
    groups = np.array([[0, 1, 2], [3, 3, 3]])
    weights = np.ones(3, np.float32)
    inputs = StepInputs(pipe.manifest, counted, times, rows, groups, weights, budget=budget, whole=whole)
    arrays = [inputs(step, slice(0, 3)) for step in range(4)]
    assert counted.rows["context"] == 3  # words 0 and 1 are equal
    assert counted.rows["summary"] == 3  # of words and pooled together: 0 and 1 are equal
    assert counted.rows["conditioner"] == 3 * 3
    assert counted.rows["modulation"] == 3 or (budget == 1 and not whole and counted.rows["modulation"] <= 6)
    assert arrays[0]["conditioning"].shape == (2, 3, 2, 8) and arrays[0]["words_mask"].shape == (2, 3, 3)
    for name in ("conditioning", "modulation"):  # of time
        np.testing.assert_array_equal(arrays[1][name], arrays[2][name])
        assert np.abs(arrays[0][name] - arrays[1][name]).max() > 1e-4
    for name in ("context", "words_mask", "guidance"):
        assert arrays[0][name] is arrays[3][name]


def by_hand(pipe, time: float, rows: dict[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    values = {name: array[row : row + 1] for name, array in rows.items()} | {"moment": np.array([time], np.float32)}
    for stage in pipe.manifest.before_loop:
        values |= pipe.engines.run(stage, {spec.name: values[spec.name] for spec in stage.reads})
    return values


def test_the_rows_are_those_of_their_samples(opened) -> None:
    pipe = opened("wave")
    rows = {"words": Noise(1).normal((6, 3, 4)), "pooled": Noise(2).normal((6, 5))}
    rows["words_mask"] = np.tri(6, 3, dtype=np.float32)
    times, groups = np.array([900.0, 300, 10]), np.array([[0, 1, 2, 3, 4], [5, 5, 5, 5, 5]])
    inputs = StepInputs(pipe.manifest, pipe.engines.run, times, rows, groups, np.ones(5, np.float32), budget=1)
    for step, time in enumerate(times):
        for samples in (slice(0, 3), slice(3, 6)):
            arrays = inputs(step, samples)
            for place, row in enumerate(groups[0][samples]):
                for group, number in enumerate((row, 5)):
                    for name, values in by_hand(pipe, time, rows, number).items():
                        if name in arrays:
                            np.testing.assert_allclose(arrays[name][group, place], values[0], rtol=1e-5, atol=1e-6)


@pytest.fixture
def stacks(monkeypatch) -> list[tuple[str, int]]:
    """The names and numbers of rows of what does not change with the step, each time that it is stacked."""
    calls: list[tuple[str, int]] = []
    call = StepInputs.__call__

    def counted(self, step, samples, groups):
        before = self._held[1]
        values = call(self, step, samples, groups)
        if self._held[1] is not before:
            calls.append((step, samples.start))
        return values

    monkeypatch.setattr(StepInputs, "__call__", counted)
    return calls


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_run_that_fits_the_engine_stacks_once(opened, stacks, monkeypatch, guidance) -> None:
    pipe = opened("captioned")
    latents = draw(pipe, 3, guidance=guidance)
    assert stacks == [(0, 0)]
    call = StepInputs.__call__

    def forgetful(self, step, samples, groups):
        self._held = None, {}
        return call(self, step, samples, groups)

    monkeypatch.setattr(StepInputs, "__call__", forgetful)
    np.testing.assert_array_equal(draw(pipe, 3, guidance=guidance), latents)
    assert len(stacks) == 1 + 4


def test_a_larger_run_stacks_each_part_as_it_comes(opened, stacks) -> None:
    """Never two parts at a time: of 100 pictures by XL/2 that would be 6 GB."""
    pipe = opened("captioned")
    together = draw(pipe, 6, output="latents")
    assert stacks == [(step, first) for step in range(4) for first in (0, 3)]
    parts = [draw(pipe, 6, some, output="latents") for some in (slice(0, 3), slice(3, 6))]
    np.testing.assert_allclose(together, np.concatenate(parts), rtol=0, atol=1e-5)  # kernels sum in another order
    assert np.abs(parts[0][0] - parts[1][0]).max() > 1e-2  # parts that are mixed up would show


def draw(pipe, count: int, some: slice = slice(None), **options) -> np.ndarray:
    rng = np.random.default_rng(count)
    captions, mask = rng.standard_normal((count, 4, 3)), np.tri(count, 4, 1)
    negative = {"captions": rng.standard_normal((1, 2, 3))}
    condition, seeds = {"captions": captions[some], "mask": mask[some]}, [*range(count)][some]
    return pipe.sample(condition=condition, negative=negative, steps=4, seed=seeds, **options)
