"""The search: random changes of the best plans on few pictures, then halving, then all pictures for the last ones.

What was scored is in a JSON file, so that a search that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from dit_export.tune import gate, plans
from dit_export.tune.gate import Limits, Score, front
from dit_export.tune.plans import Plan, key
from dit_export.tune.trial import Block, Trial
from dit_runtime.errors import UsageError
from dit_runtime.files import read_json, write_file
from dit_runtime.progress import Progress

FORMAT = 1
GROWTH = 4  # times the pictures in each round of halving
SHARE = 4  # of the plans of a round one in so many comes into the next
CHILDREN = 8  # plans of a generation
ATTEMPTS = 50  # to find a plan that is new and fits
FAR = 1_000_000  # the first seed of the last round: no plan was chosen by its pictures


@dataclass(frozen=True)
class Settings:
    trials: int = 160  # plans on few pictures
    pictures: int = 200  # of a plan in the first round
    finalists: int = 9
    final: tuple[int, int] = (5, 2_000)  # blocks of seeds, and pictures of each, for a finalist


@dataclass
class Results:
    """Scores by plan and block, kept in a file."""

    path: Path
    bundle: str  # what of the bundle decides over the pictures
    scores: dict[str, dict[str, list[Any]]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, bundle: str) -> Results:
        if not path.exists():
            return cls(path, bundle)
        try:
            table = read_json(path)
            format_, of, scores = table["format"], table["bundle"], table["scores"]
        except (UsageError, TypeError, KeyError) as error:
            raise UsageError(f"{path}: no results of `dit-export tune`: {error!r}; pass another --results") from None
        if format_ != FORMAT or of != bundle:
            raise UsageError(f"{path}: results of another bundle or version; pass another --results, or remove it")
        return cls(path, bundle, scores)

    def score(self, trial: Trial, plan: Plan, block: Block) -> Score:
        """Return a plan's score over a block; draw its pictures only where the file has none."""
        known, name = self.scores.setdefault(key(plan), {}), f"{block.first}+{block.size}"
        if name not in known:
            known[name] = list(trial(plan, block))
            table = {"format": FORMAT, "bundle": self.bundle, "scores": self.scores}
            write_file(self.path, json.dumps(table, indent=1) + "\n")
        return Score(*known[name])


def mean(scores: Iterable[Score]) -> Score:
    """Return the mean of each figure over blocks of as many pictures."""
    columns: Any = zip(*scores, strict=True)
    means: Any = (None if None in column else fmean(column) for column in columns)
    return Score(*means)


@dataclass
class Search:
    trial: Trial
    results: Results
    limits: Mapping[str, Limits]  # by preset
    settings: Settings
    progress: Progress

    def run(self) -> dict[str, Score]:
        """Return the scores of the finalists, and of the bundle's own plan, by the plan's key."""
        settings = self.settings
        scores, count = self._explore(), settings.pictures
        most = settings.final[0] * settings.final[1]
        while len(scores) // SHARE > settings.finalists and GROWTH * count < most:
            count *= GROWTH
            best = self._shortlist(scores, len(scores) // SHARE)
            with self.progress.stage(f"{len(best)} plans on {count} pictures"):
                scores = {plan: self._score(plan, Block(0, count)) for plan in best}
        finalists = self._shortlist(scores, settings.finalists)
        return {plan: self.last(json.loads(plan)) for plan in finalists}

    def _shortlist(self, scores: dict[str, Score], count: int) -> list[str]:
        base = key(plans.default(self.trial.pipe.manifest))
        best = gate.shortlist(self.limits, scores, scores[base], self.trial.unrelated, count)
        return list(dict.fromkeys([base, *best]))

    def last(self, plan: Plan) -> Score:
        """Return a plan's score over all pictures of the last round."""
        blocks, size = self.settings.final
        with self.progress.stage(f"{blocks} × {size} pictures: {key(plan)}"):
            return mean(
                self.results.score(self.trial, plan, Block(FAR + block * size, size)) for block in range(blocks)
            )

    def _score(self, plan: str, block: Block) -> Score:
        return self.results.score(self.trial, json.loads(plan), block)

    def _explore(self) -> dict[str, Score]:
        """Score plans on few pictures; each is a change or two away from one that no other beats so far."""
        contract, settings, block = self.trial.pipe.manifest, self.settings, Block(0, self.settings.pictures)
        rng = random.Random(0)  # the same plans in each run, so that one that was stopped goes on
        scores: dict[str, Score] = {}
        with self.progress.stage(f"{settings.trials} plans on {settings.pictures} pictures"):
            fitting = [self.trial.fit(plan) for plan in plans.first(contract)]
            queue = list(dict.fromkeys(key(plan) for plan in fitting if plan is not None))
            while len(scores) < settings.trials and queue:
                for plan in queue[: settings.trials - len(scores)]:
                    scores[plan] = self._score(plan, block)
                    self.progress.step(len(scores), settings.trials, "tune")
                queue = self._children(scores, rng)
        return scores

    def _children(self, scores: dict[str, Score], rng: random.Random) -> list[str]:
        parents = front(scores)
        children: dict[str, None] = {}
        most = max(score.rows for score in scores.values())
        for _ in range(ATTEMPTS * CHILDREN):
            plan: Plan = json.loads(rng.choice(parents))
            for _ in range(rng.choice((1, 1, 2))):
                changes = plans.neighbours(plan, self.trial.pipe.manifest, self.trial.times(plan))
                plan = rng.choice(changes[rng.choice(sorted(changes))])
            fitting = self.trial.fit(plan)
            if fitting is None or key(fitting) in scores or key(fitting) in children:
                continue
            if self.trial.rows(fitting) <= most:
                children[key(fitting)] = None
            if len(children) == CHILDREN:
                break
        return list(children)
