"""Conditions as users pass them: padding, masks, labels, what guidance leads away from, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dit_runtime import Request, UsageError
from dit_runtime.bundle import manifest
from dit_runtime.conditions.condition import Condition, Rows, fit, group, null_condition, unique_rows

TOKENS, WIDTH = 5, 3  # of a caption of the hand-made bundle
CLASSES = 5


@pytest.fixture
def contract(handmade):
    return lambda kind: manifest.read(handmade(kind))


def captions(count: int = 2, tokens: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, tokens, WIDTH))


def test_short_captions_are_padded_and_masked(contract) -> None:
    rows = fit({"captions": captions(2, 3)}, contract("captioned").conditions)
    assert rows["captions"].shape == (2, TOKENS, WIDTH) and rows["captions"].dtype == np.float32
    np.testing.assert_array_equal(rows["captions"][:, :3], captions(2, 3).astype(np.float32))
    assert not rows["captions"][:, 3:].any()
    np.testing.assert_array_equal(rows["mask"], [[1, 1, 1, 0, 0]] * 2)


def test_a_mask_of_the_users_own(contract) -> None:
    rows = fit({"captions": captions(2, 3), "mask": [[1, 0, 0], [True, True, False]]}, contract("captioned").conditions)
    np.testing.assert_array_equal(rows["mask"], [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    assert rows["mask"].dtype == np.float32


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ({"captions": captions(2, 6)}, "captions has shape (2, 6, 3); expected (rows, up to 5, 3)"),
        ({"captions": captions()[:, :, :2]}, "captions has shape (2, 5, 2); expected"),
        ({"captions": captions()[0]}, "captions has shape (5, 3); expected"),
        ({"captions": captions()[:, :0]}, "captions has shape (2, 0, 3); expected"),
        ({"captions": captions()[:0]}, "captions has shape (0, 5, 3); expected"),
        ({"captions": np.array(3.0)}, "captions has shape (); expected"),
        ({"captions": [["a"]]}, "captions is <U1; expected numbers"),
        ({"captions": [[1], [1, 2]]}, "captions is no array; expected numbers"),
        ({"captions": np.full((1, 5, 3), np.nan)}, "captions holds values that are not finite"),
        ({"captions": np.full((1, 5, 3), 1e300)}, "captions holds values that are not finite"),
        ({"captions": captions(), "mask": np.ones((2, 4))}, "mask has shape (2, 4); expected (2, 5) of 0 and 1"),
        ({"captions": captions(), "mask": np.full((2, 5), 0.5)}, "expected (2, 5) of 0 and 1, a 1 in every row"),
        ({"captions": captions(), "mask": np.zeros((2, 5))}, "a 1 in every row"),
        ({"captions": captions(), "mask": [["1"] * 5] * 2}, "mask is <U1; expected numbers"),
        ({"mask": np.ones((2, 5))}, "condition lacks captions; expected an array for each of captions, mask"),
        ({}, "condition lacks captions"),
        ({"captions": captions(), "caption": 1}, "unknown port 'caption' (did you mean \"captions\"?)"),
    ],
)
def test_refused_in_one_line(contract, condition, words) -> None:
    with pytest.raises(UsageError) as error:
        fit(condition, contract("captioned").conditions)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_all_ports_have_as_many_rows(contract) -> None:
    words = np.zeros((2, 3, 4))
    rows = fit({"words": words[:, :2], "pooled": np.ones((2, 5))}, contract("wave").conditions)
    assert {name: values.shape for name, values in rows.items()} == {
        "words": (2, 3, 4),
        "words_mask": (2, 3),
        "pooled": (2, 5),
    }
    with pytest.raises(UsageError, match=r"numbers of rows differ: .*words 2, pooled 3; expected one for all"):
        fit({"words": words, "pooled": np.ones((3, 5))}, contract("wave").conditions)


@pytest.mark.parametrize("values", [[6], [-1], [1.0], [[1]], []])
def test_integers_are_within_their_size(contract, values) -> None:
    with pytest.raises(UsageError, match="labels"):
        fit({"labels": np.array(values)}, contract("labels").conditions)
    rows = fit({"labels": [5, 0]}, contract("labels").conditions)
    np.testing.assert_array_equal(rows["labels"], [5, 0])  # the null too


def checked(contract, **options):
    return Request(**{"output": "latents"} | options).check(contract)


def test_labels_by_name_and_number(contract) -> None:
    labels = ["ant", "Honey Bee ", "bee", "dog", "hound", "4", 4, np.int64(3), "bee, honey bee"]
    rows = checked(contract("labels"), labels=labels).condition
    np.testing.assert_array_equal(rows["labels"], [0, 1, 1, 3, 3, 4, 4, 3, 1])
    assert rows["labels"].dtype == np.int64 and checked(contract("labels"), labels="elk").samples == 1
    with pytest.raises(UsageError, match=r'did you mean "hound"\?\); the bundle has ant, bee, cat, …'):
        checked(contract("labels"), labels=["hounds"])


@pytest.mark.parametrize(
    "bad", [[], [5], [-1], ["-1"], ["--1"], ["9" * 5000], ["\u0663"], [""], ["5"], ["null"], [1.5], [None], [True]]
)
def test_labels_that_are_none(contract, bad) -> None:
    """The null label is no class either; and numbers that only happen to convert are not labels."""
    with pytest.raises(UsageError, match=r"label|class"):
        checked(contract("labels"), labels=bad)


def test_labels_and_the_condition(contract) -> None:
    video = contract("video")
    rows = checked(video, labels=[1, 2], condition={"rate": np.array([0.5, 1.5])}).condition
    assert rows.keys() == {"labels", "rate"}  # labels fill one port, and the condition the rest
    with pytest.raises(UsageError, match="got both labels and a condition with labels"):
        checked(video, labels=[1], condition={"labels": [1], "rate": [0.5]})
    with pytest.raises(UsageError, match="condition lacks rate"):
        checked(video, labels=[1])
    with pytest.raises(UsageError, match="no labels; pass at least one class name or number"):
        checked(video, condition={"rate": [0.5]})
    with pytest.raises(UsageError, match="this bundle takes captions, mask, and no labels"):
        checked(contract("captioned"), labels=0, condition={"captions": captions()}, guidance=1.0)
    with pytest.raises(UsageError, match="class 'ant' is not known: this bundle has no names, only 0 to 2"):
        checked(video, labels=["ant"], condition={"rate": [0.5]})


def test_what_guidance_leads_away_from(contract) -> None:
    def null_of(kind: str, negative: Condition | None) -> Rows:
        bundle = contract(kind)
        return null_condition(bundle.conditions, bundle.null, negative)

    rows = null_of("labels", None)
    np.testing.assert_array_equal(rows["labels"], [CLASSES])
    rows = null_of("wave", None)
    assert not rows["words"].any() and rows["words"].shape == (1, 3, 4) and rows["words_mask"].all()
    rows = null_of("wave", {"words": np.ones((2, 1, 4))})  # the rest by constants, as many
    assert rows["words"].shape == (2, 3, 4) and rows["pooled"].shape == (2, 5)
    np.testing.assert_array_equal(rows["words_mask"], [[1, 0, 0]] * 2)
    with pytest.raises(UsageError, match="guidance needs negative= with captions, to lead away from; or pass guidance"):
        null_of("captioned", None)


def test_negative_rows_are_one_or_one_each(contract) -> None:
    own = {"captions": captions(3)}
    for rows in (1, 3):
        request = checked(contract("captioned"), condition=own, negative={"captions": captions(rows)})
        assert len(request.negative["captions"]) == rows
    with pytest.raises(UsageError, match="negative has 2 rows; expected one, or one for each of 3 samples"):
        checked(contract("captioned"), condition=own, negative={"captions": captions(2)})
    with pytest.raises(UsageError, match="negative: captions has shape"):
        checked(contract("captioned"), condition=own, negative={"captions": captions(1, 6)}, guidance=1.0)
    for negative in ({"captions": captions(1)}, {}, None):
        unguided = checked(contract("captioned"), condition=own, negative=negative, guidance=1.0)
        assert unguided.negative is None


@pytest.mark.parametrize(
    ("options", "samples"),
    [({}, 1), ({"seed": [1, 2, 3]}, 3), ({"latents": np.zeros((2, 2, 4, 4)).tolist()}, 2)],
    ids=str,
)
def test_samples_without_any_condition(contract, options, samples) -> None:
    request = checked(contract("free"), **options)
    assert request.samples == samples and request.condition == {} and request.negative is None


def test_distinct_rows_are_told_apart_by_all_their_bytes() -> None:
    rows = {
        "a": np.array([[1.0, 2], [1, 2], [1, 3], [1, 2]], np.float32),
        "b": np.array([7, 7, 7, 8]),
    }
    first, number = unique_rows(rows, {"a", "b"}, 4)
    assert (first.tolist(), number.tolist()) == ([0, 2, 3], [0, 0, 1, 2])
    first, number = unique_rows(rows, {"b"}, 4)
    assert (first.tolist(), number.tolist()) == ([0, 3], [0, 0, 0, 1])
    first, number = unique_rows(rows, set(), 4)
    assert (first.tolist(), number.tolist()) == ([0], [0, 0, 0, 0])


def test_groups_are_a_samples_own_row_and_its_negative() -> None:
    own, one, each = ({"a": np.arange(count)} for count in (3, 1, 3))
    assert group(3, own, None)[1].tolist() == [[0, 1, 2]]
    assert group(3, own, one)[1].tolist() == [[0, 1, 2], [3, 3, 3]]
    assert group(3, own, each)[1].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output": "pictures"}, "output 'pictures' is not known; known: images, latents"),
        ({"guidance": "much"}, "guidance is 'much'; expected one number, or one a sample"),
        ({"guidance": [1.0, 2.0]}, "guidance has shape (2,); expected one number or 1, one a sample"),
        ({"guidance": 1e39}, "expected finite numbers"),
        ({"guidance": 10**400}, "expected one number, or one a sample"),
        ({"latents": [[1], [1, 2]]}, "latents is no array; expected numbers"),
        ({"negative": {"labels": [[1], [1, 2]]}}, "negative: labels is no array; expected numbers"),
        ({"steps": 0}, "steps is 0; expected an integer from 1 to 1000"),
        ({"solver": "dpm"}, "solver 'dpm' is not known"),
        ({"spacing": "wide"}, "spacing 'wide' is not known"),
        ({"eta": 2.0}, "eta is 2.0; expected a number from 0"),
        ({"eta": 0.5, "solver": "dpm++"}, "eta is 0.5 with solver dpm++; only ddim takes it"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": [1, 2]}, "2 seeds for 1 samples"),
        ({"latents": np.zeros((1, 4, 4))}, "latents have shape (1, 4, 4); expected (1, 2, 4, 4)"),
    ],
    ids=str,
)
def test_a_request_is_checked_without_an_engine(contract, options, words) -> None:
    with pytest.raises(UsageError) as error:
        checked(contract("labels"), labels=[1], **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_ddpm_needs_the_variance_of_the_sampler(contract) -> None:
    """Refused before the first evaluation, where the network has no variance and the sampler takes the network's."""
    assert checked(contract("labels"), labels=[1], solver="ddpm").samples == 1
    free = contract("free")
    with pytest.raises(UsageError, match="ddpm with 'learned_range' variance needs a model that predicts its variance"):
        checked(free, solver="ddpm")
    sampler = replace(free.process.sampler, variance="fixed_small")
    assert checked(replace(free, process=replace(free.process, sampler=sampler)), solver="ddpm").samples == 1


def test_pictures_need_a_decoder(contract) -> None:
    labels = contract("labels")
    without = replace(labels, stages=tuple(stage for stage in labels.stages if stage.runs != "end"))
    assert checked(labels, labels=[1], output="images").samples == 1
    with pytest.raises(UsageError, match="this bundle has no decoder"):
        checked(without, labels=[1], output="images")
