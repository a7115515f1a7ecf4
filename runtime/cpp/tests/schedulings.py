"""Cases of the scheduler: events, and what Python decides after each; random, but always the same ones."""

from __future__ import annotations

import random
from typing import Any

from dit_runtime.serve.scheduler import Costs, Job, Scheduler

CASES, EVENTS = 10, 50


def fields(choose: random.Random, now: float) -> dict[str, Any]:
    """Return a job as its fields; some of it is what most jobs have."""
    samples = choose.choice([1, 1, 1, 2, 5])
    return {
        "samples": samples,
        "left": samples * choose.choice([2, 10, 25, 50]),
        "size": choose.choice(["", "", "", "", "32x64"]),
        "groups": choose.choice([1, 2, 2, 2]),
        "places": samples * choose.choice([1, 1, 2]),
        "most": choose.choice([2, 4, 100]),
        "weight": choose.choice([1.0, 1.0, 2.5]),
        "arrived": now,
        "deadline": choose.choice([None, None, now + 0.3, now + 2.0, now + 5.0]),
    }


def job(table: dict[str, Any]) -> Job:
    own = {name: value for name, value in table.items() if name not in ("size", "groups")}
    return Job(kind=(table["size"], table["groups"]), **own)


def scheduling(number: int) -> dict[str, Any]:
    """Return a case: clients come, calls are made, jobs end; each as an event and its outcome."""
    choose, now = random.Random(number), 0.0
    costs = Costs()
    scheduler: Scheduler[Job] = Scheduler(choose.choice([2, 4, 8]), costs)
    names: dict[Job, int] = {}
    events: list[dict[str, Any]] = []
    for name in range(EVENTS):
        now += choose.choice([0.0, 0.001, 0.05, 0.4])
        what = choose.choice(["submit", "submit", "submit", "call", "call", "cost", "leave"])
        if what == "submit":
            table = fields(choose, now)
            new = job(table)
            late = scheduler.lateness(new)
            events.append({"submit": table, "name": name, "work": scheduler.work(new), "lateness": late})
            if late <= 0:
                scheduler.push(new)
                names[new] = name
        elif what == "call":
            picked = scheduler.pick()
            groups = choose.choice([1, 2, 2, 2])
            events.append({"call": [names[each] for each in picked], "groups": groups})
            for each in picked:
                each.started, each.left = True, max(0, each.left - each.samples * groups)
                each.kind = (each.kind[0], groups)  # type: ignore[index]
        elif what == "cost":
            kind, seconds = choose.choice(["row", "start", "decode"]), choose.choice([0.001, 0.002, 0.004])
            units = choose.choice([1.0, 1.0, 5.0])
            costs.update(kind, seconds * units, units)
            events.append({"cost": kind, "seconds": seconds * units, "units": units, "mean": costs(kind)})
        elif scheduler.jobs:
            gone = choose.choice(scheduler.jobs)
            scheduler.remove(gone)
            scheduler.undecoded = choose.choice([0.0, gone.samples * gone.weight])
            order = [names[each] for each in scheduler.jobs]
            events.append({"leave": names[gone], "undecoded": scheduler.undecoded, "order": order})
    return {"places": scheduler.places, "events": events}


def schedulings() -> list[dict[str, Any]]:
    return [scheduling(number) for number in range(CASES)]
