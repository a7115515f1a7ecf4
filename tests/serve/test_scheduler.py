"""The scheduler on a clock that counts measured costs: exact, whatever else the machine does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dit_runtime.serve.scheduler import Costs, Job, Scheduler

# Milliseconds of a guided call by its samples: the demo in int8 on OpenVINO in free dimensions, one thread's processor
# time; then the Python of a row and step, and the stages before the loop with the decoder, of a picture.
CURVE = {1: 1.22, 2: 1.88, 4: 3.16, 8: 5.73}
ROW, PICTURE = 0.05, 13.0
UNGUIDED = 0.8  # of a guided call's time
MIX = (10, 25, 50)
Served = list[tuple[float, int]]  # seconds of latency, steps


def call(samples: int, groups: int = 2) -> float:
    share = 1.0 if groups == 2 else UNGUIDED
    return (share * float(np.interp(samples, [*CURVE], [*CURVE.values()])) + ROW * samples) / 1e3


def arrivals(load: float, count: int, seed: int = 0) -> Iterator[tuple[float, int]]:
    """Yield Poisson arrivals; load 1 is what one request at a time can do."""
    each, random_, now = np.mean(MIX) * call(1) + PICTURE / 1e3, random.Random(seed), 0.0
    for _ in range(count):
        now += random_.expovariate(load / each)
        yield now, random_.choice(MIX)


def by_request(jobs: list[tuple[float, int]], size: int = 8) -> Served:
    """Batch whole requests of one number of steps, as servers without step-level batching do."""
    waiting: list[tuple[float, int]] = []
    now, served, ahead = 0.0, [], [*jobs]
    while ahead or waiting:
        now = now if waiting else max(now, ahead[0][0])
        while ahead and ahead[0][0] <= now:
            waiting.append(ahead.pop(0))
        batch = [job for job in waiting if job[1] == waiting[0][1]][:size]
        waiting = [job for job in waiting if job not in batch]
        now += batch[0][1] * call(len(batch)) + len(batch) * PICTURE / 1e3
        served += [(now - arrived, steps) for arrived, steps in batch]
    return served


def costs(places: int) -> Costs:
    known = Costs()
    known.update("row", call(places), 2 * places)
    known.update("decode", PICTURE / 1e3)
    return known


def by_step(
    jobs: list[tuple[float, int]],
    places: int = 8,
    deadline: float | None = None,
    slower: float = 1.0,
    noise: float = 0.0,
    unguided: int = 0,
) -> tuple[Served, int, float]:
    """Let the scheduler choose each call; return what was served, how many were refused, and when all was done.

    `slower` is by how much calls take longer than what was measured before the first, and `noise` how much longer they
    take by chance, on average. Of so many requests one is `unguided`: it shares no call with the others.
    """
    scheduler: Scheduler[Job] = Scheduler(places, costs(places))
    chance = random.Random(1)
    ahead, undecoded, served, refused, now = [*jobs], [], [], 0, 0.0
    left: dict[Job, int] = {}
    while ahead or left or undecoded:
        if not left and not undecoded:
            now = max(now, ahead[0][0])
        while ahead and ahead[0][0] <= now:
            arrived, steps = ahead.pop(0)
            groups = 1 if unguided and not len(ahead) % unguided else 2
            until = None if deadline is None else arrived + deadline
            job = Job(1, steps * groups, groups, arrived=arrived, deadline=until)
            if scheduler.lateness(job) > 0:
                refused += 1
                continue
            scheduler.push(job)
            left[job] = steps
        if picked := scheduler.pick():
            groups = picked[0].kind
            spent = slower * (1 + noise * chance.expovariate(1)) * call(len(picked), groups)
            now += spent
            scheduler.costs.update("row", spent, len(picked) * groups)
            for job in picked:
                job.started, job.left = True, job.left - groups
                if not job.left:
                    scheduler.remove(job)
                    undecoded.append(job)
        if undecoded:
            job = undecoded.pop(0)
            now += slower * PICTURE / 1e3
            scheduler.costs.update("decode", slower * PICTURE / 1e3)
            served.append((now - job.arrived, left.pop(job)))
        scheduler.undecoded = len(undecoded)
    return served, refused, now


def percentiles(served: Served, steps: int | None = None) -> tuple[float, float]:
    chosen = [seconds for seconds, count in served if steps in (None, count)]
    median, late = np.percentile(chosen, [50, 99])
    return float(median), float(late)


def test_short_requests_do_not_wait_for_long_ones() -> None:
    """Lengths are mixed and the load is 1.2 of what one at a time can do. Counted: 0.54, 0.29 and 0.96."""
    jobs = [*arrivals(1.2, 1500)]
    requests, (steps, *_) = by_request(jobs), by_step(jobs)
    assert len(steps) == len(requests) == len(jobs)
    assert percentiles(steps)[0] <= 0.7 * percentiles(requests)[0]
    assert percentiles(steps, 10)[1] <= 0.5 * percentiles(requests, 10)[1]
    assert percentiles(steps)[1] <= percentiles(requests)[1]  # nobody pays for it


def test_one_at_a_time_a_short_request_still_passes() -> None:
    """On a flat curve calls have one sample, and the order alone helps."""
    jobs = [*arrivals(0.8, 800)]
    in_line, (fair, *_) = by_request(jobs, 1), by_step(jobs, 1)
    assert percentiles(fair)[0] <= 0.8 * percentiles(in_line)[0]
    assert percentiles(fair, 10)[1] <= 0.6 * percentiles(in_line, 10)[1]


@pytest.mark.parametrize(("slower", "noise", "unguided"), [(1.0, 0, 0), (1.3, 0, 0), (1.0, 0.5, 3), (1.3, 0.5, 3)])
def test_overload_is_refused_in_time(slower: float, noise: float, unguided: int) -> None:
    """Ten times what one at a time can do, and a deadline of 5 seconds: admitted requests meet it, of any length."""
    how: dict[str, Any] = {"slower": slower, "noise": noise, "unguided": unguided}
    closed, _, ended = by_step([(0.0, MIX[number % 3]) for number in range(400)], **how)
    capacity = len(closed) / ended
    jobs = [*arrivals(10, 4000)]
    served, refused, ended = by_step(jobs, deadline=5.0, **how)
    late = sum(seconds > 5.0 for seconds, _ in served)
    assert refused + len(served) == len(jobs) and refused > len(jobs) / 2
    assert late <= 0.02 * len(served)
    assert (len(served) - late) / ended >= 0.9 * capacity
    assert all(sum(steps == count for _, steps in served) > 0.25 * len(served) for count in MIX)


def scheduler(places: int, row: float = 1.0) -> Scheduler[Job]:
    known = Costs()
    known.update("row", row)
    return Scheduler(places, known)


def test_a_long_job_is_not_passed_for_ever() -> None:
    """Short jobs arrive as fast as they can be done; those that come after the long one's due time wait."""
    line, long_job = scheduler(1), Job(1, 10, arrived=0.0)
    line.push(long_job)
    for second in range(200):
        line.push(Job(1, 1, arrived=float(second)))
        (job,) = line.pick()
        job.started, job.left = True, job.left - 1
        if not job.left:
            line.remove(job)
        if not long_job.left:
            break
    assert 10 < second < 100 and long_job not in line.jobs


def test_a_call_has_one_kind_and_so_many_places() -> None:
    line = scheduler(3)
    jobs = [Job(1, 5, kind) for kind in (2, 1, 2, 1, 2, 2)]
    for number, job in enumerate(jobs):
        job.arrived = float(number)
        line.push(job)
    assert line.pick() == [jobs[0], jobs[2], jobs[4]]
    jobs[0].places = 2  # its groups are evaluated as samples from now on
    assert line.pick() == [jobs[0], jobs[2]]
    jobs[2].samples = jobs[2].places = 5  # more than a call has: alone, in parts
    assert line.pick() == [jobs[0], jobs[4]]
    line.remove(jobs[0])
    jobs[1].kind = 2
    assert line.pick() == [jobs[1], jobs[4], jobs[5]]


def test_only_so_many_are_under_way() -> None:
    """Jobs that are passed hold memory, so newcomers wait when twice a call's samples have begun."""
    line = scheduler(2)
    begun = [Job(1, 10, arrived=float(number), started=True) for number in range(4)]
    for job in begun:
        line.push(job)
    short = Job(1, 1, arrived=0.5)
    line.push(short)
    assert line.jobs[0] is short and line.pick() == begun[:2]
    line.remove(begun[3])
    assert line.pick() == [short, begun[0]]


def test_whether_a_job_would_be_late() -> None:
    """One place and a second a row: what is ahead may take the margin, and its own work the rest."""
    line = scheduler(1)
    line.push(Job(1, 6, arrived=0.0, deadline=10.0))
    assert line.lateness(Job(1, 4, arrived=0.0, deadline=10.0)) == 0
    assert line.lateness(Job(1, 5, arrived=0.0, deadline=10.0)) == pytest.approx(1)
    assert line.lateness(Job(1, 0.5, arrived=0.0, deadline=9.5)) == 0  # ahead of the other, which has a later deadline
    line.push(Job(1, 0.5, arrived=0.0, deadline=10.0))
    assert line.lateness(Job(1, 1, arrived=0.0, deadline=10.0)) == pytest.approx(0.5)
    assert line.lateness(Job(0, 0, arrived=0.0, deadline=10.0)) == pytest.approx(0.5)  # and whatever else may come
    assert line.lateness(Job(1, 99, arrived=0.0)) == 0
    assert [job.left for job in line.jobs] == [6, 0.5]  # the question changes nothing


def test_work_that_can_wait_refuses_nobody() -> None:
    """A long job with a deadline far away is passed, so that it does not count."""
    line = scheduler(1)
    line.push(Job(1, 500, arrived=0.0, deadline=1000.0))
    assert line.lateness(Job(1, 5, arrived=10.0, deadline=20.0)) == 0
    assert line.lateness(Job(1, 5, arrived=99.0, deadline=109.0)) > 0  # due at 100 at the latest: from then on it does


def test_the_slower_of_two_means_counts() -> None:
    known = Costs()
    assert known("row") == 0
    for seconds in [1.0] * 50:
        known.update("row", seconds)
    known.update("row", 2.0)
    assert known("row") == pytest.approx(1.3)  # a machine that becomes slower is noticed at once
    for _ in range(20):
        known.update("row", 1.0)
    assert known("row") > 1.01  # and believed to be slow for a while
    known.update("decode", 1.0, 10)
    known.update("decode", 8.0, 1)  # a call with one unit counts for less than one with ten
    assert known("decode") == pytest.approx((0.7 * 1 + 0.3 * 8) / (0.7 * 10 + 0.3 * 1))
