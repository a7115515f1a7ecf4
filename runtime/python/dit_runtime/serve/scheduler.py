"""Which requests share the next call of the step stage, and whether another one can be finished in time.

Nothing here runs an engine or reads a clock; the batcher does both.

A job that arrives at time a with w seconds of work is due at a + STRETCH · w, and the earliest due goes first. So a short
request passes a long one that is under way, and no request waits for all that come after it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable
from dataclasses import dataclass, field

STRETCH = 8.0  # times its work: the latency up to which a job goes before all later ones
MARGIN = 0.8  # of the time up to a deadline that an estimate may take: estimates are off
FAST, SLOW = 0.3, 0.02  # weights of a new value in two running means; the larger mean counts


@dataclass(eq=False)
class Job:
    """A request in the scheduler. A row is a sample in one group of conditions: a guided sample has two."""

    samples: int
    left: float  # rows that are still to be evaluated
    kind: Hashable = 2  # the number of groups in its next call; jobs of one kind can share a call
    places: int = 1  # in its next call; a sample takes two where its groups are evaluated as samples
    arrived: float = 0.0
    deadline: float | None = None
    started: bool = False
    due: float = field(default=0.0, init=False)  # set by the scheduler


class Costs:
    """Seconds of work, as running means of what was measured: the slower of a fast mean and of a slow one."""

    def __init__(self) -> None:
        self._means: dict[str, tuple[float, float]] = {}

    def update(self, what: str, seconds: float) -> None:
        fast, slow = self._means.get(what, (seconds, seconds))
        self._means[what] = fast + FAST * (seconds - fast), slow + SLOW * (seconds - slow)

    def __call__(self, what: str) -> float:
        """Return the seconds of a "row", of a "start", or of the "decode" of a sample; 0 before any was measured."""
        return max(self._means.get(what, (0.0, 0.0)))


class Scheduler:
    """Jobs in the order in which they are due."""

    def __init__(self, places: int, costs: Costs) -> None:
        """`places` is the number of samples that one call has at most."""
        self.places, self.costs = places, costs
        self.jobs: list[Job] = []
        self.undecoded = 0  # samples that have left, and whose pictures are still to be decoded

    def push(self, job: Job) -> None:
        job.due = job.arrived + STRETCH * self.work(job)
        if job.deadline is not None:  # so that a long job starts well before its deadline
            job.due = min(job.due, (job.arrived + job.deadline) / 2)
        insort(self.jobs, job, key=lambda other: other.due)

    def remove(self, job: Job) -> None:
        self.jobs.remove(job)

    def pick(self) -> list[Job]:
        """Return the jobs of the next call: the first one due, and of its kind those that fit.

        At most twice as many are under way as fit one call, because each holds memory.
        """
        under_way = sum(job.places for job in self.jobs if job.started)
        picked: list[Job] = []
        free = self.places
        for job in self.jobs:
            if not job.started and under_way and under_way + job.places > 2 * self.places:
                continue
            if picked and (job.kind != picked[0].kind or job.places > free):
                continue
            under_way += 0 if job.started else job.places
            free -= job.places
            picked.append(job)
            if free <= 0:
                break
        return picked

    def work(self, job: Job) -> float:
        """Return the seconds that a job would take in full batches."""
        start = 0.0 if job.started else self.costs("start")
        return start + job.left * self.costs("row") + job.samples * self.costs("decode")

    def backlog(self) -> float:
        """Return the seconds of work that are left."""
        return sum(map(self.work, self.jobs)) + self.undecoded * self.costs("decode")

    def lateness(self, job: Job) -> float:
        """Return how many seconds a newcomer, or the worst of the jobs that it delays, would miss its margin by.

        In a full batch an evaluation of a job takes as long as the whole batch's. So a job ends after what is due before
        it and the batches that it is in; at the latest when all work is done.
        """
        decode = self.costs("decode")
        self.push(job)
        end_of_all, before, worst, delayed = self.backlog(), self.undecoded * decode, 0.0, False
        for other in self.jobs:
            delayed = delayed or other is job
            if delayed and other.deadline is not None:
                batches = other.left * self.costs("row") * max(1.0, self.places / other.places)
                end = min(end_of_all, before + batches + other.samples * decode)
                allowed = MARGIN * (other.deadline - other.arrived) - (job.arrived - other.arrived)
                worst = max(worst, end - allowed)
            before += self.work(other)
        self.remove(job)
        return worst
