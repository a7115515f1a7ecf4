"""What surrounds the solver: the conditioning table and its budget, batches and seeds, guidance, names, stopping."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from dit_runtime.conditioning import TABLE_BYTES, Table

from dit_runtime import EngineError, Pipeline, Stopped, UsageError

CLASSES, MAX_BATCH, CHANNELS, SIDE = 12, 4, 4, 8  # of the bundle that the fixture `meta` has built
# Rows of a batch are independent but for the order in which a kernel sums them, over the steps of a run: measured
# 1e-6; a row that took its neighbour's label, guidance or noise is off by 1e-1.
SPLIT_RTOL = 2e-5


class FakeConditioner:
    """Rows that tell which (t, label) they are for, and a record of all calls."""

    width = 6  # numbers a row

    def __init__(self) -> None:
        self.calls: list[list[tuple[float, int]]] = []

    def __call__(self, timesteps, labels):
        assert timesteps.dtype == np.float32 and labels.dtype == np.int64
        self.calls.append([*zip(timesteps.tolist(), labels.tolist(), strict=True)])
        rows = np.stack([timesteps, labels.astype(np.float32)], axis=1)
        return np.repeat(rows[:, :, None], self.width // 2, axis=2)  # (N, K = 2, D = 3)

    @property
    def pairs(self) -> list[tuple[float, int]]:
        return [pair for call in self.calls for pair in call]


def held_bytes(table: Table) -> int:
    """Memory of the arrays that the table keeps alive, each counted once by what it really holds on to."""
    arrays = {}
    for value in vars(table).values():
        for array in value.values() if isinstance(value, dict) else [value]:
            if isinstance(array, np.ndarray) and array.dtype == np.float32 and array.ndim == 3:
                base = array if array.base is None else array.base
                arrays[id(base)] = base.nbytes
    return sum(arrays.values())


def run(steps: int, labels: list[int], null: int | None, budget: int, max_rows: int = 8):
    fake = FakeConditioner()
    row_bytes = 4 * fake.width
    times = [float(t) for t in range(10 * steps, 0, -10)]
    table = Table(fake, times, labels, null, row_bytes, max_rows, budget)
    peak = 0
    for step, t in enumerate(times):
        for first in range(0, len(labels), 3):  # as a batch is split
            rows = table(step, slice(first, first + 3))
            own = labels[first : first + 3]
            assert rows.shape == (1 if null is None else 2, len(own), 2, 3)
            assert (rows[:, :, 0] == t).all()
            assert rows[0, :, 1, 0].tolist() == own
            assert null is None or (rows[1, :, 1] == null).all()
        peak = max(peak, held_bytes(table))
    return fake, peak, row_bytes


@pytest.mark.parametrize("null", [99, None])
@pytest.mark.parametrize("count", [1, 5, 64])
def test_the_table_stays_within_its_budget(count, null):
    """64 different labels take as much memory as one, as long as one step of them fits."""
    distinct = count + (null is not None)
    budget = 24 * distinct * 3 + 5  # three steps and a bit: the window is not the run
    fake, peak, row_bytes = run(20, list(range(count)), null, budget)
    assert row_bytes * distinct <= peak <= budget
    assert len(fake.pairs) == len({*fake.pairs}) == 20 * distinct  # each pair once: nothing is made again or in vain
    assert sum(label == null for _, label in fake.pairs) == (0 if null is None else 20)


def test_a_default_budget_for_many_labels_of_the_largest_model():
    """XL/2 at 50 guided steps is 78 MB a label: one label fits whole, and 64 do not get 64 times that."""
    row_bytes = 4 * 170 * 1152
    assert 50 * 2 * row_bytes < TABLE_BYTES < 64 * 50 * row_bytes


def test_a_step_larger_than_the_budget_is_still_made():
    """A window is at least one step; the memory of a single step cannot be saved."""
    fake, peak, row_bytes = run(4, list(range(10)), 99, budget=1)
    assert peak == 11 * row_bytes and len(fake.pairs) == 44


def test_calls_are_no_larger_than_the_engine_takes():
    fake, _, _ = run(10, list(range(7)), 99, budget=10**6, max_rows=5)
    assert max(map(len, fake.calls)) == 5 and len(fake.calls) == 80 // 5


def test_equal_labels_are_made_once():
    fake, _, _ = run(6, [3, 3, 7, 3, 7, 99], 99, budget=10**6)
    assert sorted({*fake.pairs}) == sorted(fake.pairs) and len(fake.pairs) == 6 * 3


@pytest.fixture(scope="module")
def pipe(meta):
    with Pipeline.load(meta.bundle, threads=1) as pipe:
        yield pipe


def latents(pipe, labels, **options):
    return pipe.sample(labels, **{"steps": 5, "guidance": 3.0, "output": "latents"} | options)


def far(first, second) -> float:
    return float(np.abs(first - second).max() / np.abs(second).max())


LABELS = [0, 11, 5, 5, 7, 2, 9, 1, 4]  # nine: two whole batches and one more


def test_more_labels_than_a_batch_one_stream(pipe):
    """An int seed is one stream for the whole run, as in PyTorch, however the engine's batch splits it."""
    sizes = []
    record = _wrapped(pipe, lambda inputs: sizes.append(len(inputs["latents"])))
    split = latents(record, LABELS, seed=3)
    assert sizes == [MAX_BATCH, MAX_BATCH, 1] * 5
    table = {**pipe.manifest.graphs, "denoiser": replace(pipe.manifest.graphs["denoiser"], max_batch=100)}
    whole = Pipeline(pipe.folder, replace(pipe.manifest, graphs=table), pipe._engines)
    assert far(split, latents(whole, LABELS, seed=3)) < SPLIT_RTOL
    assert far(split[:4], latents(pipe, LABELS[:4], seed=3)) < SPLIT_RTOL  # the stream's beginning
    assert far(split[2], split[3]) > 0.1  # equal labels, but each its own noise


def test_the_conditioner_gets_no_more_than_it_takes(pipe):
    """Whoever asks, a profile of TensorRT ends at max_batch."""
    sizes = []
    engine = _Engine(pipe._engines["conditioner"], lambda inputs: sizes.append(len(inputs["labels"])))
    table = {**pipe.manifest.graphs, "conditioner": replace(pipe.manifest.graphs["conditioner"], max_batch=4)}
    narrow = Pipeline(pipe.folder, replace(pipe.manifest, graphs=table), {"conditioner": engine})
    times, labels = np.linspace(1, 900, len(LABELS), dtype=np.float32), np.array(LABELS)
    split = narrow.condition(times, labels)
    assert sizes == [4, 4, 1]
    assert far(split, pipe.condition(times, labels)) < SPLIT_RTOL


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++"])
def test_a_list_of_seeds_is_one_run_a_sample(pipe, solver):
    """A sample with its own seed does not depend on its batch, even where every step draws noise."""
    seeds = [40 + n for n in range(len(LABELS))]
    together = latents(pipe, LABELS, seed=seeds, solver=solver)
    for label, seed, result in zip(LABELS, seeds, together, strict=True):
        assert far(result, latents(pipe, [label], seed=[seed], solver=solver)[0]) < SPLIT_RTOL
        assert far(result, latents(pipe, [label], seed=seed, solver=solver)[0]) < SPLIT_RTOL


def test_pictures_of_many_labels(shared_embedders):
    """The decoder splits too: the same uint8 pictures as one at a time, but for values that round the other way."""
    with Pipeline.load(shared_embedders.bundle, threads=1) as pipe:
        together = pipe.sample([5, 6, 7, 8, 9], steps=3, seed=[1, 2, 3, 4, 5])
        for number, picture in enumerate(together):
            alone = pipe.sample(5 + number, steps=3, seed=[1 + number])[0]
            difference = np.abs(picture.astype(int) - alone)
            assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_guidance_per_sample(pipe):
    """More than a batch of them, so that each part must take its own."""
    labels, strengths = [3, 3, 8, 3, 8, 3], [1.0, 4.0, 2.5, 3.0, 1.5, 2.0]
    together = latents(pipe, labels, guidance=strengths, seed=[7] * 6)
    for label, strength, result in zip(labels, strengths, together, strict=True):
        assert far(result, latents(pipe, [label], guidance=strength, seed=[7])[0]) < SPLIT_RTOL
    assert far(together[0], together[1]) > 0.1


def test_guidance_below_one_is_none_in_a_batch_too(pipe):
    """Where <= 1 means without guidance, a neighbour that is guided must not change that."""
    contract = replace(pipe.manifest, unguided_up_to_one=True)
    kin = Pipeline(pipe.folder, contract, pipe._engines)
    together = latents(kin, [1, 2], guidance=[0.5, 4.0], seed=[7, 8])
    assert far(together[0], latents(kin, [1], guidance=0.5, seed=[7])[0]) < SPLIT_RTOL


@pytest.mark.parametrize(
    ("up_to_one", "guidance", "groups"),
    [
        (False, 1.0, 1),
        (False, 0.5, 2),
        (False, 4.0, 2),
        (False, [1.0, 1.0], 1),
        (False, [1.0, 2.0], 2),
        (True, 1.0, 1),
        (True, 0.5, 1),
        (True, 0.0, 1),
        (True, 1.0001, 2),
        (True, [0.5, 1.0], 1),
        (True, [0.5, 1.5], 2),
    ],
)
def test_when_the_null_rows_are_needed(pipe, up_to_one, guidance, groups):
    """Meta's dialect leaves them out at exactly 1, diffusers' up to 1; else half of the work would be in vain."""
    seen, asked = set(), set()
    contract = replace(pipe.manifest, unguided_up_to_one=up_to_one)
    record = _wrapped(pipe, lambda inputs: seen.add(inputs["conditioning"].shape[0]), contract)
    record._engines["conditioner"] = _Engine(pipe._engines["conditioner"], lambda i: asked.update(i["labels"].tolist()))
    latents(record, [1, 2], guidance=guidance, steps=2)
    assert seen == {groups} and asked == {1, 2, CLASSES} - ({CLASSES} if groups == 1 else set())


def test_on_step(pipe):
    seen = []
    final = latents(pipe, [1], on_step=lambda step, steps, x: seen.append((step, steps, x.copy())))
    assert [entry[:2] for entry in seen] == [(step, 5) for step in range(1, 6)]
    assert np.array_equal(seen[-1][2].astype(np.float32), final)
    assert all(far(a[2], b[2]) > 1e-3 for a, b in pairwise(seen))


def test_on_step_stops_the_run(pipe):
    calls = []
    record = _wrapped(pipe, lambda _: calls.append(1))
    with pytest.raises(Stopped, match="2 of 5"):
        latents(record, [1], on_step=lambda step, *_: step == 2)
    assert len(calls) == 2
    assert len(latents(pipe, [1], on_step=lambda *_: 1)) == 1  # only True itself stops: a count returned does not


def test_latents_of_the_users_own(pipe):
    own = np.random.default_rng(0).standard_normal((2, CHANNELS, SIDE, SIDE))
    result = latents(pipe, [1, 2], latents=own, seed=0)
    assert np.array_equal(result, latents(pipe, [1, 2], latents=own, seed=99))  # the seed draws nothing here
    assert far(result, latents(pipe, [1, 2], seed=0)) > 0.1
    for wrong in (own[:1], own[:, :3], own[0], np.where(own > 2, np.nan, own)):
        with pytest.raises(UsageError, match="latents have shape"):
            latents(pipe, [1, 2], latents=wrong)


def test_labels_by_name(shared_embedders):
    with Pipeline.load(shared_embedders.bundle, threads=1) as pipe:
        assert pipe.label_ids(["golden retriever", "Golden Retriever ", "12", 12, np.int64(3)]) == [207, 207, 12, 12, 3]
        assert pipe.label_ids(["otter", "river dog", "otter, river dog"]) == [360, 360, 360]
        with pytest.raises(UsageError, match='did you mean "golden retriever"'):
            pipe.label_ids(["golden retreiver"])
        by_name = pipe.sample("river dog", steps=1, output="latents")
        assert np.array_equal(by_name, pipe.sample(360, steps=1, output="latents"))


@pytest.mark.parametrize("bad", [[], [CLASSES], [-1], ["-1"], ["--1"], [""], ["12"], ["null"], [1.5], [None], [True]])
def test_labels_that_are_none(pipe, bad):
    """The null label is no class either; and numbers that only happen to convert are not labels."""
    with pytest.raises(UsageError, match=r"label|class"):
        pipe.label_ids(bad)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("step", [1, 4])
def test_a_prediction_that_is_not_finite_names_the_step(pipe, value, step):
    calls = []

    def spoil(outputs):
        calls.append(1)
        if len(calls) == step:
            outputs["prediction"][0, 0, 0, 0] = value
        return outputs

    engine = _Engine(pipe._engines["denoiser"], lambda _: None, spoil)
    broken = Pipeline(pipe.folder, pipe.manifest, pipe._engines | {"denoiser": engine})
    with pytest.raises(EngineError, match=f"step {step} "):
        latents(broken, [1])
    assert len(calls) == step


def test_an_engine_that_fails_is_named(pipe):
    def fail(inputs):
        raise RuntimeError("out of memory\nand where in its source")

    engine = _Engine(pipe._engines["denoiser"], fail)
    broken = Pipeline(pipe.folder, pipe.manifest, pipe._engines | {"denoiser": engine})
    with pytest.raises(EngineError, match=r"^the denoiser's engine failed: out of memory$"):
        latents(broken, [1])


class _Engine:
    """An engine with an eye on what goes in and a hand on what comes out."""

    def __init__(self, engine, look, change=lambda outputs: outputs) -> None:
        self.engine, self.look, self.change = engine, look, change

    def run(self, inputs):
        self.look(inputs)
        return self.change(self.engine.run(inputs))


def _wrapped(pipe: Pipeline, look, contract=None) -> Pipeline:
    engines = dict(pipe._engines) | {"denoiser": _Engine(pipe._engines["denoiser"], look)}
    return Pipeline(pipe.folder, contract or pipe.manifest, engines)
