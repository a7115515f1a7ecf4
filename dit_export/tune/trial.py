"""A plan on trial: its pictures before the bundle's judge, and beside those of a long run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_export.tune.gate import Score
from dit_export.tune.plans import Plan, default
from dit_export.verify.distribution import Gaussian, fit, gaussian_distance
from dit_export.verify.features import Judge, Judged, plan_draw
from dit_runtime import images
from dit_runtime.conditions.condition import Rows
from dit_runtime.errors import UsageError
from dit_runtime.pipeline import Pipeline
from dit_runtime.request import Request
from dit_runtime.verify import Reference

LONG = 4  # times the bundle's steps: the long run
NEAR = 64  # pictures of each block that are compared with the long run's
CHUNK = 50  # pictures at a time

Pictures = NDArray[np.uint8]
Tick = Callable[[int, int], None]


class Block(NamedTuple):
    """Pictures of consecutive seeds; two blocks may have none in common."""

    first: int  # seed
    size: int


class Trial:
    def __init__(self, pipe: Pipeline, reference: Reference, judge: Judge | None, real: Gaussian | None, tick: Tick):
        self.pipe, self.judge, self.real, self.tick = pipe, judge, real, tick
        self._reference = reference
        self._long: dict[int, Pictures] = {}  # by a block's first seed

    def fit(self, plan: Plan) -> Plan | None:
        """Return the plan, without a spacing that changes nothing; None where the bundle does not take it."""
        plain = {name: value for name, value in plan.items() if name != "spacing"}
        times = self.times(plan)
        if not times:
            return None
        return plain if times == self.times(plain) else plan

    def times(self, plan: Plan) -> list[float]:
        """Return the times that the plan's network reads; [] where the bundle does not take it."""
        try:
            return self._request(plan, Block(0, 1)).check(self.pipe.manifest).timesteps.tolist()
        except UsageError:
            return []

    def rows(self, plan: Plan) -> int:
        """Return the rows of a picture, at most where a cache decides while it is drawn."""
        run = self.pipe.run(self._request(plan, Block(0, 1)))
        return run.steps * 2 if run.planned_rows is None else run.planned_rows

    def __call__(self, plan: Plan, block: Block) -> Score:
        """Draw the block's pictures and score them."""
        long, drawn, judged, rows = self.long(block), [], [], 0.0
        for first in range(0, block.size, CHUNK):
            part = Block(block.first + first, min(CHUNK, block.size - first))
            run = self.pipe.run(self._request(plan, part))
            pictures = run.result()
            rows += float(np.mean(run.rows)) * part.size / block.size
            if self.judge is not None:
                judged.append(self.judge(pictures))
            drawn.append(pictures[: max(0, len(long) - first)])
            self.tick(first + part.size, block.size)
        pairs = zip(np.concatenate(drawn), long, strict=True)
        psnr = float(np.mean([min(images.psnr(*pair), 100.0) for pair in pairs]))  # equal pictures are ∞ dB
        return Score(rows, psnr, *self._verdict(judged, self._labels(block)))

    def _verdict(self, judged: list[Judged], labels: NDArray[np.int64] | None) -> tuple[float | None, float | None]:
        """Return the Fréchet distance to real pictures and the share of classes that the judge sees."""
        if not judged or self.real is None:
            return None, None
        frechet = gaussian_distance(fit(np.concatenate([part.features for part in judged])), self.real)
        logits = [part.logits for part in judged if part.logits is not None]
        if not logits or labels is None or logits[0].shape[1] != self.pipe.manifest.classes:
            return frechet, None
        return frechet, float((np.concatenate(logits).argmax(1) == labels).mean())

    def long(self, block: Block) -> Pictures:
        """Return the long run's pictures of the first seeds of a block."""
        count, have = min(NEAR, block.size), self._long.get(block.first)
        if have is None or len(have) < count:
            plan = default(self.pipe.manifest)
            steps = min(LONG * plan["steps"], self.pipe.manifest.process.train_steps)
            parts = [
                self.pipe.run(self._request({**plan, "steps": steps}, Block(block.first + first, size))).result()
                for first in range(0, count, CHUNK)
                if (size := min(CHUNK, count - first))
            ]
            self._long[block.first] = have = np.concatenate(parts)
        return have[:count]

    @cached_property
    def unrelated(self) -> float:
        """The mean PSNR between the long run's pictures of one condition and different seeds."""
        turn = max(1, self.pipe.manifest.classes)
        pictures = self.long(Block(0, min(NEAR, 2 * turn)))
        return float(np.mean([images.psnr(*pair) for pair in zip(pictures, np.roll(pictures, turn, 0), strict=True)]))

    def _labels(self, block: Block) -> NDArray[np.int64] | None:
        classes = self.pipe.manifest.classes
        return (block.first + np.arange(block.size)) % classes if classes else None

    def _request(self, plan: Plan, block: Block) -> Request:
        condition, negative = self._conditions(block)
        seeds = list(range(block.first, block.first + block.size))
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in plan.items()
        }
        return Request(condition=condition, negative=negative, seed=seeds, **fields)

    def _conditions(self, block: Block) -> tuple[Rows, Rows | None]:
        """Return conditions in turn, so that a picture's depends on its seed alone."""
        draw = plan_draw(self.pipe.manifest, self._reference, block.size)
        own = {
            name: rows[(block.first + np.arange(block.size)) % len(rows)]
            for name, rows in self._reference.condition.items()
        }
        if (labels := self._labels(block)) is not None:
            own["labels"] = labels
        return own, draw.negative
