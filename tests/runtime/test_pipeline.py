"""Tests around the solver: batches and seeds, guidance, conditions of every kind, stepping."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from dit_runtime import Pipeline, Request, UsageError
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.sampling.noise import Noise
from tests.runtime.watched import LABELS, WatchedEngine, latents, watch_denoiser, with_stage

NULL, MAX_BATCH, SHAPE = 5, 3, (2, 4, 4)  # of the hand-made bundle that takes labels
# Rows of a batch are independent but for the order in which a kernel sums them, over the steps of a run: measured
# 1e-6; a row that took its neighbour's label, guidance or noise is off by 1e-1.
SPLIT_RTOL = 2e-5


def far(first, second) -> float:
    return float(np.abs(first - second).max() / np.abs(second).max())


def test_more_labels_than_a_batch_one_stream(pipe):
    """An int seed is one stream for the whole run, as in PyTorch, however the engine's batch splits it."""
    sizes = []
    record = watch_denoiser(pipe, lambda inputs: sizes.append(len(inputs["latents"])))
    split = latents(record, LABELS, seed=3)
    assert sizes == [MAX_BATCH, MAX_BATCH, 1] * 5
    whole = with_stage(pipe, "denoiser", max_batch=100)
    assert far(split, latents(whole, LABELS, seed=3)) < SPLIT_RTOL
    assert far(split[:4], latents(pipe, LABELS[:4], seed=3)) < SPLIT_RTOL  # the stream's beginning
    assert far(split[2], split[3]) > 0.1  # equal labels, but each its own noise


def test_each_stage_gets_no_more_than_it_takes(pipe):
    """Whoever asks, a profile of TensorRT ends at max_batch."""
    sizes = []
    engine = WatchedEngine(pipe.engines.opened["conditioner"], lambda inputs: sizes.append(len(inputs["labels"])))
    narrow = with_stage(pipe, "conditioner", {"conditioner": engine}, max_batch=2)
    expected = latents(pipe, LABELS, seed=3)
    assert np.array_equal(latents(narrow, LABELS, seed=3), expected)
    assert {*sizes[:-1]} == {2} and sum(sizes) == 5 * len({*LABELS, NULL})


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++"])
def test_a_list_of_seeds_is_one_run_a_sample(pipe, solver):
    """A sample with its own seed does not depend on its batch, even where every step draws noise."""
    seeds = [40 + n for n in range(len(LABELS))]
    together = latents(pipe, LABELS, seed=seeds, solver=solver)
    for label, seed, result in zip(LABELS, seeds, together, strict=True):
        assert far(result, latents(pipe, [label], seed=[seed], solver=solver)[0]) < SPLIT_RTOL
        assert far(result, latents(pipe, [label], seed=seed, solver=solver)[0]) < SPLIT_RTOL


def test_pictures_of_many_labels(pipe):
    """The decoder splits too: the same uint8 pictures as one at a time, but for values that round the other way."""
    together = pipe.sample([0, 1, 2, 3, 4], steps=3, seed=[1, 2, 3, 4, 5])
    for number, picture in enumerate(together):
        alone = pipe.sample(number, steps=3, seed=[1 + number])[0]
        difference = np.abs(picture.astype(int) - alone)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_guidance_per_sample(pipe):
    """More than a batch of them, so that each part must take its own."""
    labels, strengths = [3, 3, 2, 3, 2, 3], [1.0, 4.0, 2.5, 3.0, 1.5, 2.0]
    together = latents(pipe, labels, guidance=strengths, seed=[7] * 6)
    for label, strength, result in zip(labels, strengths, together, strict=True):
        assert far(result, latents(pipe, [label], guidance=strength, seed=[7])[0]) < SPLIT_RTOL
    assert far(together[0], together[1]) > 0.1


@pytest.mark.parametrize("solver", ["ddim", "unipc", "deis3"])
def test_times_of_a_request(pipe, solver):
    """A list in words or numbers is one and the same run, and its count is the steps."""
    steps_done = []
    watch = lambda step, steps, _: steps_done.append((step, steps))  # noqa: E731

    def drawn(spacing, steps=None, **options):
        return latents(pipe, [3], solver=solver, spacing=spacing, steps=steps, **options)

    words = drawn("999, 640, 300", on_step=watch)
    assert steps_done == [(1, 3), (2, 3), (3, 3)]
    np.testing.assert_array_equal(drawn((999, 640.0, np.int64(300))), words)
    assert far(drawn("999, 640, 301", steps=3), words) > 1e-6
    for spacing, message in [
        ([], r"spacing '\[\]' is not known"),
        ([[999, 640]], "is not known"),
        ([999, "x"], "expected a name, or falling times"),
        ([640, 999], "expected a name, or falling times as in"),
    ]:
        with pytest.raises(UsageError, match=message):
            drawn(spacing)
    with pytest.raises(UsageError, match="steps is 5; expected 2"):
        drawn("999, 640", steps=5)


def test_guidance_below_one_is_none_in_a_batch_too(pipe):
    """A guided neighbour does not change a row whose guidance <= 1 means none."""
    kin = Pipeline(pipe.folder, up_to_one(pipe, True), pipe.engines.opened)
    together = latents(kin, [1, 2], guidance=[0.5, 4.0], seed=[7, 8])
    assert far(together[0], latents(kin, [1], guidance=0.5, seed=[7])[0]) < SPLIT_RTOL


@pytest.mark.parametrize(
    ("up_to_one_", "guidance", "groups"),
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
def test_when_the_null_rows_are_needed(pipe, up_to_one_, guidance, groups):
    """Meta's dialect leaves them out at exactly 1, diffusers' up to 1; else half of the work would be in vain."""
    counts, asked = set(), set()
    record = watch_denoiser(
        pipe, lambda inputs: counts.add(inputs["conditioning"].shape[0]), up_to_one(pipe, up_to_one_)
    )
    conditioner = pipe.engines.opened["conditioner"]
    record.engines.opened["conditioner"] = WatchedEngine(conditioner, lambda i: asked.update(i["labels"].tolist()))
    latents(record, [1, 2], guidance=guidance, steps=2)
    assert counts == {groups} and asked == {1, 2, NULL} - ({NULL} if groups == 1 else set())


def test_on_step(pipe):
    events = []
    final = latents(pipe, [1], on_step=lambda step, steps, x: events.append((step, steps, x.copy())))
    assert [entry[:2] for entry in events] == [(step, 5) for step in range(1, 6)]
    assert np.array_equal(events[-1][2].astype(np.float32), final)
    assert all(far(a[2], b[2]) > 1e-4 for a, b in pairwise(events))


def test_latents_of_the_users_own(pipe):
    own = np.random.default_rng(0).standard_normal((2, *SHAPE))
    result = latents(pipe, [1, 2], latents=own, seed=0)
    assert np.array_equal(result, latents(pipe, [1, 2], latents=own.tolist(), seed=99))  # the seed draws nothing here
    assert far(result, latents(pipe, [1, 2], seed=0)) > 0.1
    for wrong in (own[:1], own[:, :1], own[0], np.where(own > 1, np.nan, own)):
        with pytest.raises(UsageError, match="latents have shape"):
            latents(pipe, [1, 2], latents=wrong)


def stepped(pipe: Pipeline, request: Request) -> tuple[np.ndarray, list[np.ndarray]]:
    run, states = pipe.run(request), []
    more = True
    while more:
        more = run.step()
        states.append(run.state)
    return run.result(), states


CONDITIONS = {
    "labels": {"labels": [1, 3, 2, 0]},
    "captioned": {
        "condition": {"captions": Noise(1).normal((4, 4, 3)), "mask": np.tri(4, 4)},
        "negative": {"captions": Noise(2).normal((1, 2, 3))},
    },
    "wave": {"condition": {"words": Noise(3).normal((4, 2, 4)), "pooled": Noise(4).normal((4, 5))}},
    "video": {"labels": [0, 1, 2, 1], "condition": {"rate": np.array([0.5, 0.1, 2.0, 1.0])}},
    "free": {"guidance": 1.0},
}


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_a_run_that_is_stepped_is_the_sample(opened, kind, solver):
    """States of rank 1, 3 and 4; labels, captions, two conditions, and none."""
    pipe = opened(kind)
    options = {"steps": 4, "seed": [1, 2, 3, 4], "solver": solver, "output": "latents", **CONDITIONS[kind]}
    if solver == "ddpm" and kind in ("wave", "video", "free"):  # which have no variance of their own
        pipe = Pipeline(pipe.folder, fixed_variance(pipe.manifest), pipe.engines.opened)
    watched = []
    expected = pipe.sample(on_step=lambda step, steps, state: watched.append((step, steps, state)), **options)
    result, states = stepped(pipe, Request(**options))
    assert np.array_equal(result, expected) and result.shape == (4, *pipe.manifest.state.shape)
    assert [entry[:2] for entry in watched] == [(step, 4) for step in (1, 2, 3, 4)]
    assert all(np.array_equal(state, entry[2]) for state, entry in zip(states, watched, strict=True))


def fixed_variance(contract: Manifest) -> Manifest:
    sampler = replace(contract.process.sampler, variance="fixed_small")
    return replace(contract, process=replace(contract.process, sampler=sampler))


@pytest.mark.parametrize("kind", CONDITIONS)
def test_each_sample_is_what_it_is_alone(opened, kind):
    """More samples than an engine takes, each with its own condition: none takes its neighbour's."""
    pipe = opened(kind)
    options = {"steps": 4, "output": "latents", "guidance": 3.0, **CONDITIONS[kind]}
    together = pipe.sample(seed=[1, 2, 3, 4], **options)
    for number in range(4):
        own = {name: values[number : number + 1] for name, values in options.get("condition", {}).items()}
        alone = options | {"condition": own} | ({"labels": [options["labels"][number]]} if "labels" in options else {})
        assert far(together[number], pipe.sample(seed=[number + 1], **alone)[0]) < SPLIT_RTOL


def test_a_negative_for_each_sample(opened):
    pipe = opened("captioned")
    own, away = Noise(1).normal((4, 5, 3)), Noise(2).normal((4, 5, 3))
    options = {"steps": 4, "output": "latents"}
    together = pipe.sample(condition={"captions": own}, negative={"captions": away}, seed=[1, 2, 3, 4], **options)
    for number in range(4):
        rows = slice(number, number + 1)
        conditions = {"condition": {"captions": own[rows]}, "negative": {"captions": away[rows]}}
        assert far(together[number], pipe.sample(seed=[number + 1], **conditions, **options)[0]) < SPLIT_RTOL
    shared = pipe.sample(condition={"captions": own}, negative={"captions": away[:1]}, seed=[1, 2, 3, 4], **options)
    assert far(shared[0], together[0]) < SPLIT_RTOL and far(shared[1], together[1]) > 0.01


def test_the_negative_takes_the_place_of_the_constants(opened):
    pipe = opened("labels")
    options = {"labels": [1], "steps": 3, "output": "latents"}
    null = pipe.sample(negative={"labels": [NULL]}, **options)
    assert np.array_equal(null, pipe.sample(**options))
    assert far(pipe.sample(negative={"labels": [2]}, **options), null) > 0.01
    same = pipe.sample(negative={"labels": [1]}, **options)  # guidance away from itself is none
    assert far(same, pipe.sample(guidance=1.0, **options)) < SPLIT_RTOL


def test_every_part_of_a_condition_counts(opened):
    """Changed alone, words, the mask and the pooled vector each move the result."""
    pipe, condition = opened("wave"), {"words": Noise(3).normal((1, 3, 4)), "pooled": Noise(4).normal((1, 5))}
    options = {"steps": 4, "output": "latents"}
    own = pipe.sample(condition=condition, **options)
    for name in condition:
        assert far(pipe.sample(condition=condition | {name: condition[name] + 1}, **options), own) > 1e-3
    assert far(pipe.sample(condition=condition | {"words_mask": [[1, 1, 0]]}, **options), own) > 1e-3


def test_low_memory_draws_the_same(opened):
    for kind in CONDITIONS:
        options = {"steps": 4, "seed": [1, 2, 3, 4], "output": "latents", **CONDITIONS[kind]}
        assert np.array_equal(opened(kind, low_memory=True).sample(**options), opened(kind).sample(**options))


def test_guidance_changes_nothing_where_the_network_has_none(opened):
    pipe = opened("free")
    assert np.array_equal(pipe.sample(guidance=9.0, steps=3), pipe.sample(guidance=1.0, steps=3))


def test_a_run_begins_with_its_noise(pipe):
    run = pipe.run(Request([1, 2], steps=2, seed=3, output="latents"))
    assert np.array_equal(run.state, Noise(3).normal((2, *SHAPE)))
    assert run.step() and not run.step() and not run.step()  # no more than its steps
    assert np.array_equal(run.result(), run.state.astype(np.float32))


def up_to_one(pipe: Pipeline, value: bool) -> Manifest:
    return replace(pipe.manifest, guidance=replace(pipe.manifest.guidance, unguided_up_to_one=value))
