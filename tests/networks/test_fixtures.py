"""Fixture conditions: spread, seeded, storable as float16, and never what guidance leads away from."""

from __future__ import annotations

import numpy as np
import torch

from dit_export.networks import Network, fixtures
from dit_runtime.bundle.manifest import Port

STATE, TIME = Port("x", "state", "float32", (2, 3)), Port("t", "time", "float32", ())
LABELS = Port("labels", "condition", "int64", (), size=13)
PROMPT = Port("prompt", "condition", "float32", (10, 4))
MASK = Port("mask", "condition", "float32", (10,), masks="prompt")
POOLED = Port("pooled", "condition", "float32", (10, 4))


def network(*ports: Port, **fields) -> Network:
    return Network(torch.nn.Identity(), (STATE, TIME, *ports), **fields)


def test_classes_are_spread_and_are_not_the_null():
    labelled = network(LABELS, null={"labels": 12})
    assert fixtures.conditions(labelled, 2)["labels"].tolist() == [3, 9]
    assert sorted(fixtures.conditions(labelled, 12)["labels"]) == list(range(12))
    assert fixtures.null(labelled)["labels"].tolist() == [12]
    without = network(LABELS)  # the last value stands for what guidance leads away from
    assert 12 not in fixtures.conditions(without, 24)["labels"] and fixtures.null(without)["labels"].tolist() == [12]


def test_weights_of_guidance_are_weights():
    strength = Port("strength", "condition", "float32", ())
    rows = fixtures.conditions(network(strength, guidance_port="strength"), 50)["strength"]
    assert rows.shape == (50,) and 1 <= rows.min() < 2 and 7 < rows.max() <= 8
    assert np.array_equal(rows.astype(np.float16), rows)
    assert fixtures.conditions(network(strength), 50)["strength"].min() < 0


def test_numbers_are_seeded_by_port_and_row():
    prompted = network(PROMPT, POOLED)
    two, five = (fixtures.conditions(prompted, count) for count in (2, 5))
    for name in ("prompt", "pooled"):
        assert np.array_equal(two[name], five[name][:2])
        assert np.array_equal(two[name], two[name].astype(np.float16))
    rows = [*five["prompt"], *five["pooled"], *fixtures.null(prompted)["prompt"], *fixtures.null(prompted)["pooled"]]
    assert len({row.tobytes() for row in rows}) == 12


def test_masks_have_falling_lengths():
    masked = network(PROMPT, MASK)
    rows = fixtures.conditions(masked, 3)["mask"]
    assert rows.sum(1).tolist() == [10, 8, 5] and rows.dtype == np.float32
    assert fixtures.null(masked)["mask"].sum(1).tolist() == [2]
    one = network(
        Port("prompt", "condition", "float32", (1, 4)), Port("mask", "condition", "float32", (1,), masks="prompt")
    )
    assert fixtures.conditions(one, 4)["mask"].tolist() == [[1.0]] * 4


def test_constants_and_tokens():
    tokens = Port("tokens", "condition", "int64", (6,), size=5)
    made = network(tokens, POOLED, null={"pooled": 0.0})
    rows, null = fixtures.conditions(made, 4), fixtures.null(made)
    assert rows["tokens"].shape == (4, 6) and rows["tokens"].max() < 5 and null["tokens"].shape == (1, 6)
    assert not null["pooled"].any() and null["pooled"].shape == (1, 10, 4)
    assert fixtures.conditions(network(), 2) == {} == fixtures.null(network())


def test_another_condition():
    """Classes move on by one and never to the null; other values are the next row's, or the null row's where equal."""
    labels, null = {"labels": np.array([3, 11])}, {"labels": np.array([12])}
    assert fixtures.another([LABELS], labels, null)["labels"].tolist() == [4, 0]
    tokens = Port("tokens", "condition", "int64", (2,), size=3)
    moved = fixtures.another([tokens], {"tokens": np.array([[0, 2]])}, {"tokens": np.array([[1, 1]])})
    assert moved["tokens"].tolist() == [[2, 0]]
    numbers = Port("b", "condition", "float32", (1,))
    moved = fixtures.another([numbers], {"b": np.array([[0.0], [0.0], [1.0]])}, {"b": np.array([[9.0]])})
    assert moved["b"].tolist() == [[9.0], [1.0], [0.0]]
    alone = Port("a", "condition", "int64", (), size=2)
    assert fixtures.another([alone], {"a": np.array([0])}, {"a": np.array([1])})["a"].tolist() == [1]
