"""The choice of the requests that share the next call of the step stage, and the refusal of those too late to finish.

Nothing here runs an engine or reads a clock; the batcher does both.

A job that arrives at time a with w seconds of work is due at a + STRETCH · w, and the earliest due goes first. So a
short request passes a long one that is under way, and no request waits for all that come after it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Generic, TypeVar

from dit_runtime.facts import CONSTANTS

STRETCH: float = CONSTANTS["due_stretch"]  # times its work: the latency up to which a job goes before all later ones
# Shares of the time up to a deadline. MARGIN: for what is ahead of a newcomer, by an estimate. PASSED: for what comes
# later and goes first; the rest is for its own steps, one after the other.
MARGIN: float = CONSTANTS["deadline_margin"]
PASSED: float = CONSTANTS["deadline_passed"]
FAST: float = CONSTANTS["fast_mean"]  # weights of a new value in two running means; the larger mean counts
SLOW: float = CONSTANTS["slow_mean"]


@dataclass(eq=False)
class Job:
    """A request in the scheduler. A row is a sample in one group of conditions: a guided sample has two."""

    samples: int
    left: float  # rows that are still to be evaluated
    kind: Hashable = 2  # the number of groups in its next call; jobs of one kind can share a call
    places: int = 1  # in its next call; a sample takes two where its groups are evaluated as samples
    most: int = 2**31  # places of a call of its kind, where that is fewer than the scheduler's
    weight: float = 1.0  # of its rows and pictures, in those of the first size
    arrived: float = 0.0
    deadline: float | None = None
    started: bool = False
    due: float = field(default=0.0, init=False)  # set by the scheduler


AnyJob = TypeVar("AnyJob", bound=Job)


class Costs:
    """Seconds of work, from running means of seconds and of units; the slower of a fast mean and of a slow one."""

    def __init__(self) -> None:
        self._means: dict[str, list[tuple[float, float]]] = {}

    def update(self, what: str, seconds: float, units: float = 1.0) -> None:
        """Learn that so many units took so many seconds; a call with many units counts for more than one with few."""
        known = self._means.get(what, [(seconds, units)] * 2)
        self._means[what] = [
            (mean + weight * (seconds - mean), count + weight * (units - count))
            for (mean, count), weight in zip(known, (FAST, SLOW), strict=True)
        ]

    def __call__(self, what: str) -> float:
        """Return the seconds of a "row", of a "start", or of the "decode" of a sample; 0 before any was measured."""
        return max(seconds / units for seconds, units in self._means.get(what, [(0.0, 1.0)]))


class Scheduler(Generic[AnyJob]):
    """Jobs in the order in which they are due."""

    def __init__(self, places: int, costs: Costs) -> None:
        """`places` is the number of samples that one call has at most."""
        self.places, self.costs = places, costs
        self.jobs: list[AnyJob] = []
        self.undecoded = 0.0  # weight of the samples that have left, and whose pictures are still to be decoded

    def push(self, job: AnyJob) -> None:
        job.due = self._due(job)
        insort(self.jobs, job, key=lambda other: other.due)

    def remove(self, job: AnyJob) -> None:
        self.jobs.remove(job)

    def pick(self) -> list[AnyJob]:
        """Return the jobs of the next call: the first one due, and of its kind those that fit.

        At most twice as many are under way as fit one call, because each holds memory.
        """
        under_way = sum(job.places for job in self.jobs if job.started)
        picked: list[AnyJob] = []
        free = self.places
        for job in self.jobs:
            if not job.started and under_way and under_way + job.places > 2 * self.places:
                continue
            if picked and (job.kind != picked[0].kind or job.places > free):
                continue
            under_way += 0 if job.started else job.places
            free = (free if picked else min(free, job.most)) - job.places
            picked.append(job)
            if free <= 0:
                break
        return picked

    def work(self, job: Job) -> float:
        """Return the seconds that a job would take in full batches."""
        return self._seconds([job])

    def _seconds(self, jobs: Iterable[Job]) -> float:
        start, row, decode = map(self.costs, ("start", "row", "decode"))
        return sum(
            (0.0 if job.started else start) + job.weight * (job.left * row + job.samples * decode) for job in jobs
        )

    def lateness(self, job: Job) -> float:
        """Return by how many seconds what is ahead of a newcomer exceeds MARGIN of the time up to its deadline, or that
        and its own work exceed all of it.

        Ahead is what is due before it, and whatever has an earlier deadline. The newcomer's own work does not count for
        MARGIN: otherwise there would never be room for long requests where short ones take all that becomes free.
        """
        if job.deadline is None:
            return 0.0
        due, deadline = self._due(job), job.deadline
        others = (other for other in self.jobs if other.due <= due or (other.deadline or inf) <= deadline)
        ahead = self._seconds(others) + self.undecoded * self.costs("decode")
        time = deadline - job.arrived
        return max(0.0, ahead - MARGIN * time, ahead + self.work(job) - time)

    def _due(self, job: Job) -> float:
        """Return when a job is due; with a deadline so early that no more passes it than can in PASSED of its time."""
        stretched = STRETCH * self.work(job)
        if job.deadline is not None:
            stretched = min(stretched, PASSED * (job.deadline - job.arrived))
        return job.arrived + stretched
