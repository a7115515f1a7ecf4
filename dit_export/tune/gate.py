"""Limits that a plan must keep to become a preset: its rows, and its loss against the bundle's own plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dit_runtime.errors import UsageError, nearest
from dit_runtime.verify import Figure


class Score(NamedTuple):
    """Figures of a plan over some pictures."""

    rows: float  # a picture: evaluations of the network × groups of conditions
    psnr: float  # mean, in dB, to the long run's picture of the same seed
    frechet: float | None = None  # to real pictures, by the bundle's judge
    agreement: float | None = None  # share of pictures in which the judge sees the class that was asked for

    @property
    def quality(self) -> float:
        """Return what a search minimizes: the Fréchet distance, or without one the negative PSNR; NaN counts as ∞."""
        value = -self.psnr if self.frechet is None else self.frechet
        return math.inf if math.isnan(value) else value


class Limits(NamedTuple):
    """A budget: of rows, and of loss against the bundle's own plan. None: no limit."""

    rows: float | None = None
    frechet: float | None = None  # times the Fréchet distance
    agreement: float | None = None  # points, of 100
    psnr: float | None = None  # dB


# Without a judge the loss in PSNR alone is limited.
JUDGED = {
    "quality": Limits(frechet=1.0, agreement=0.5),
    "balanced": Limits(frechet=1.0, agreement=0.5),
    "fast": Limits(frechet=1.5, agreement=1.5),
}
UNJUDGED = {"quality": Limits(psnr=0.0), "balanced": Limits(psnr=3.0), "fast": Limits(psnr=6.0)}
METRICS = {  # of figures -> the limit's name
    "PSNR in dB to the long run": "psnr",
    "rows a picture": "rows",
    "Fréchet distance": "frechet",
    "judge's agreement, share": "agreement",
}
BEST = "quality"  # the preset that has as many rows as the bundle's own plan, and the best quality


def budgets(words: Sequence[str], judged: bool) -> dict[str, Limits]:
    """Return each preset's limits: the defaults, changed as "fast:rows=14,frechet=2" or "psnr=3" state."""
    limits = dict(JUDGED if judged else UNJUDGED)
    for word in words:
        name, colon, rest = word.rpartition(":")
        if colon and name not in limits:
            raise UsageError(f"budget {word!r}: preset {name!r}{nearest(name, limits)}; known: {', '.join(limits)}")
        values = {}
        for entry in rest.split(","):
            metric, _, number = entry.partition("=")
            if metric not in Limits._fields:
                raise UsageError(f"budget {word!r}: {metric!r} is not known; known: {', '.join(Limits._fields)}")
            if metric in ("frechet", "agreement") and not judged:
                raise UsageError(f"budget {word!r} needs a judge, and the bundle has none; expected psnr=DECIBELS")
            try:
                values[metric] = float(number)
            except ValueError:
                values[metric] = math.nan
            if not 0 <= values[metric] < math.inf:
                raise UsageError(f"budget {word!r}: {metric} is {number!r}; expected a number of 0 or more")
        for preset in [name] if colon else limits:
            limits[preset] = limits[preset]._replace(**values)
    return limits


def figures(preset: str, limits: Limits, score: Score, base: Score, unrelated: float) -> list[Figure]:
    """Hold a plan's score to the limits; `unrelated` is the PSNR between pictures of different seeds.

    A plan whose pictures are no nearer to the long run's than other pictures are is refused in any case.
    """
    least = unrelated if limits.psnr is None else max(unrelated, base.psnr - limits.psnr)
    rows = [Figure(preset, "PSNR in dB to the long run", score.psnr, least, at_least=True)]
    if limits.rows is not None:
        rows.append(Figure(preset, "rows a picture", score.rows, limits.rows))
    if limits.frechet is not None and score.frechet is not None and base.frechet is not None:
        rows.append(Figure(preset, "Fréchet distance", score.frechet, limits.frechet * base.frechet))
    if limits.agreement is not None and score.agreement is not None and base.agreement is not None:
        share = base.agreement - limits.agreement / 100
        rows.append(Figure(preset, "judge's agreement, share", score.agreement, share, at_least=True))
    return rows


def ranked(
    preset: str, limits: Limits, scores: Mapping[str, Score], base: Score, unrelated: float
) -> list[tuple[str, list[Figure]]]:
    """Return plans and their figures, the best one for the preset first.

    Plans within the limits come first. A budget of rows is spent on quality: of the plans within it the best counts.
    Without one, that of the fewest rows.
    """
    spends = limits.rows is not None or preset == BEST
    if spends and limits.rows is None:
        limits = limits._replace(rows=base.rows)
    verdicts = {key: figures(preset, limits, score, base, unrelated) for key, score in scores.items()}

    def order(key: str) -> tuple[float, float, float]:
        score, broken = scores[key], sum(_excess(figure) for figure in verdicts[key])
        return (broken, score.quality, score.rows) if spends else (broken, score.rows, score.quality)

    return [(key, verdicts[key]) for key in sorted(scores, key=order)]


def reachable(preset: str, limits: Limits, scores: Mapping[str, Score], base: Score, unrelated: float) -> str:
    """Return the budget that the plan nearest to the limits keeps; "" where no budget accepts that plan."""
    key, verdict = ranked(preset, limits, scores, base, unrelated)[0]
    score = scores[key]
    lost = {"rows": score.rows, "psnr": base.psnr - score.psnr}
    if score.frechet is not None and base.frechet:
        lost["frechet"] = score.frechet / base.frechet
    if score.agreement is not None and base.agreement is not None:
        lost["agreement"] = 100 * (base.agreement - score.agreement)
    broken = {METRICS[figure.metric] for figure in verdict if not figure.passed}
    values = {name: math.ceil(1000 * lost[name]) / 1000 for name in broken if math.isfinite(lost.get(name, math.nan))}
    if not all(figure.passed for figure in figures(preset, limits._replace(**values), score, base, unrelated)):
        return ""
    return f"{preset}:{','.join(f'{name}={values[name]:g}' for name in Limits._fields if name in values)}"


def _excess(figure: Figure) -> float:
    """Return by how much of its limit a figure fails; 0 where it passes."""
    if figure.passed or figure.limit is None:
        return 0.0
    part = abs(figure.value - figure.limit) / (abs(figure.limit) or 1.0)
    return math.inf if math.isnan(part) else part


def shortlist(
    limits: Mapping[str, Limits], scores: Mapping[str, Score], base: Score, unrelated: float, count: int
) -> list[str]:
    """Return the best plans of each preset in turn, up to `count`."""
    columns = [[key for key, _ in ranked(name, limit, scores, base, unrelated)] for name, limit in limits.items()]
    return [*dict.fromkeys(key for place in zip(*columns, strict=True) for key in place)][:count]


def front(scores: Mapping[str, Score]) -> list[str]:
    """Return the keys of the plans that no other one beats in rows and quality, the fewest rows first."""
    best, chosen = math.inf, []
    for key in sorted(scores, key=lambda key: (scores[key].rows, scores[key].quality)):
        if scores[key].quality < best:
            best = scores[key].quality
            chosen.append(key)
    return chosen
