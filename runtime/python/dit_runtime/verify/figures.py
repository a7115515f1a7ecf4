"""Figure, the one verdict: what was measured, where, and the limit that it must keep to; and tables of figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    stage: str  # of the bundle; "sampler" and "run" are no stages of it
    metric: str  # with its unit: "prediction, rel-L2"
    value: float
    limit: float | None = None  # None: reported, no gate
    at_least: bool = False  # the value must reach the limit, else stay below it
    step: int | None = None  # of the run, from 1
    where: str = ""  # for people

    @property
    def name(self) -> str:
        return f"{self.stage}: {self.metric}"

    @property
    def passed(self) -> bool:
        if self.limit is None:
            return not math.isnan(self.value)
        return self.value >= self.limit if self.at_least else self.value <= self.limit  # False for NaN

    def to_dict(self) -> dict[str, Any]:
        limit = None if self.limit is None else jsonable(self.limit)
        return {"name": self.name, **asdict(self), "value": jsonable(self.value), "limit": limit, "passed": self.passed}


def jsonable(value: float) -> float | str:
    """Return a number that JSON holds, or the text of NaN and ∞."""
    return value if math.isfinite(value) else str(value)


def worst(figures: Sequence[Figure]) -> list[Figure]:
    """Return one figure for each name: its first failure, or its worst."""
    by_name: dict[str, list[Figure]] = {}
    for figure in figures:
        by_name.setdefault(figure.name, []).append(figure)
    return [
        next((figure for figure in same if not figure.passed), None)
        or (min if same[0].at_least else max)(same, key=lambda figure: figure.value)
        for same in by_name.values()
    ]


def summary(proof: str, figures: Sequence[Figure]) -> dict[str, Any]:
    """Return what the manifest keeps of them, beside the outcome of the build's proof."""
    values = {figure.name: jsonable(figure.value) for figure in worst(figures)}
    return {"proof": proof, "passed": all(figure.passed for figure in figures), "worst": values}


def outcome(figures: Sequence[Figure]) -> str:
    """Return how many figures keep their limits, in words."""
    failed = [figure for figure in figures if not figure.passed]
    return f"{len(failed)} of {len(figures)} checks failed" if failed else f"{len(figures)} checks passed"


def table(figures: Sequence[Figure]) -> str:
    """Return the table that a person reads."""
    rows = worst(figures)
    width = max([len(row.name) for row in rows] + [len("check")])
    lines = [f"{'check':<{width}} {'worst':>9}  {'limit':>10}"]
    for row in rows:
        limit = f"{'>=' if row.at_least else '<='} {row.limit:<7.3g}" if row.limit is not None else " " * 10
        mark = "ok" if row.passed else "FAILED"
        lines.append(f"{row.name:<{width}} {row.value:>9.3g}  {limit}  {mark:<6}  {row.where}".rstrip())
    return "\n".join(lines)
