"""Budgets, and plans that must not pass them."""

from __future__ import annotations

import math

import pytest

from dit_export.tune import gate
from dit_export.tune.gate import JUDGED, UNJUDGED, Limits, Score
from dit_runtime.errors import UsageError

BASE = Score(50, 25.0, 0.20, 0.990)
UNRELATED = 10.0
GOOD = {"base": BASE, "good": Score(20, 20.0, 0.19, 0.986), "quick": Score(12, 18.0, 0.28, 0.978)}


def best(preset: str, scores: dict[str, Score], limits: Limits | None = None) -> str | None:
    key, verdict = gate.ranked(preset, limits or JUDGED[preset], scores, BASE, UNRELATED)[0]
    return key if all(figure.passed for figure in verdict) else None


def test_presets_take_the_fewest_rows_within_their_loss() -> None:
    assert (best("quality", GOOD), best("balanced", GOOD), best("fast", GOOD)) == ("good", "good", "quick")


def test_a_budget_of_rows_is_spent_on_quality() -> None:
    more = GOOD | {"better": Score(13, 18.0, 0.21, 0.98)}
    assert best("fast", more) == "quick"
    assert best("fast", more, JUDGED["fast"]._replace(rows=14)) == "better"
    assert best("fast", more, JUDGED["fast"]._replace(rows=11)) is None


@pytest.mark.parametrize(
    "bad",
    [
        Score(12, 18.0, 0.301, 0.99),  # Fréchet distance above 1.5 times
        Score(12, 18.0, 0.20, 0.974),  # agreement 1.6 points below
        Score(12, 9.9, 0.20, 0.99),  # as far from the long run as other pictures
        Score(12, 18.0, math.nan, 0.99),
        Score(12, math.nan, 0.20, 0.99),
    ],
    ids=str,
)
def test_each_figure_refuses_alone(bad: Score) -> None:
    assert best("fast", {"bad": bad}) is None
    assert best("fast", {"bad": bad, "base": BASE}) == "base"
    assert best("fast", {"bad": bad._replace(psnr=18.0, frechet=0.20, agreement=0.99)}) == "bad"


def test_without_a_judge_psnr_counts() -> None:
    scores = {"base": Score(50, 25.0), "near": Score(20, 22.5), "far": Score(12, 18.0)}
    for preset, expected in (("quality", "base"), ("balanced", "near"), ("fast", "near")):
        assert gate.ranked(preset, UNJUDGED[preset], scores, scores["base"], UNRELATED)[0][0] == expected


def test_budgets_in_words() -> None:
    limits = gate.budgets(["fast:rows=14,frechet=2", "psnr=3"], judged=True)
    assert limits["fast"] == Limits(rows=14, frechet=2, agreement=1.5, psnr=3)
    assert limits["balanced"] == JUDGED["balanced"]._replace(psnr=3)
    for words, said in (
        ("slow:rows=3", "preset 'slow'"),
        ("rows", "expected a number of 0 or more"),
        ("row=3", "'row' is not known; known: rows, frechet"),
        ("rows=-1", "expected a number of 0 or more"),
        ("rows=inf", "expected a number of 0 or more"),
    ):
        with pytest.raises(UsageError, match=said):
            gate.budgets([words], judged=True)
    with pytest.raises(UsageError, match="needs a judge, and the bundle has none"):
        gate.budgets(["frechet=2"], judged=False)


def test_the_front_is_what_no_plan_beats() -> None:
    scores = GOOD | {"worse": Score(20, 20.0, 0.25, 0.99), "slower": Score(30, 20.0, 0.19, 0.99)}
    assert gate.front(scores) == ["quick", "good"]


def test_a_shortlist_has_the_best_of_each_preset() -> None:
    scores = GOOD | {f"bad {rows}": Score(rows, 18.0, 9.0, 0.5) for rows in range(8, 12)}
    assert set(gate.shortlist(JUDGED, scores, BASE, UNRELATED, 3)) == {"base", "good", "quick"}
