"""Plans, how a picture is sampled: a request's fields as a preset has them, and the plans one change away."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dit_runtime.bundle.manifest import Manifest
from dit_runtime.facts import FACTS
from dit_runtime.sampling.process import SOLVERS

Plan = Mapping[str, Any]

FEWEST = 4  # steps
MOVES = (-3, -2, -1, 1, 2)  # of the number of steps
EDGE = 0.1  # by which an end of the guidance interval moves, of the time's range
FIRST_INTERVAL = (0.2, 0.7)  # Kynkäänniemi et al., arXiv 2404.07724: guidance in the middle of the noise levels
WEIGHTS = (0.8, 1.25)  # of guidance: an interval leaves room for a greater one
FIRST_STEPS = (1.0, 0.6, 0.5, 0.4)  # of the bundle's steps
INTERVAL = "guidance_interval"
CACHES: tuple[dict[str, Any], ...] = (
    {"cache": "taylorseer", "cache_interval": 2, "max_order": 0},
    {"cache": "taylorseer", "cache_interval": 2, "max_order": 1},
    {"cache": "taylorseer", "cache_interval": 3, "max_order": 1},
)  # not easycache: it decides for all pictures of a request at once, and here many are drawn in one
CACHE_FIELDS = {"cache", *(name for settings in FACTS["caches"].values() for name in settings)}


def key(plan: Plan) -> str:
    return json.dumps(plan, sort_keys=True)


def default(contract: Manifest) -> Plan:
    """Return the plan of a request that states none."""
    sampler = contract.process.sampler
    return {"solver": sampler.solver, "steps": sampler.steps}


def first(contract: Manifest) -> Iterator[Plan]:
    """Yield the plans that a search starts from: the bundle's with fewer steps, guided throughout and in the middle."""
    base = default(contract)
    for share in FIRST_STEPS:
        plan = {**base, "steps": max(min(FEWEST, base["steps"]), round(share * base["steps"]))}
        yield plan
        if contract.mixes_guidance:
            yield {**plan, INTERVAL: list(FIRST_INTERVAL)}


def neighbours(plan: Plan, contract: Manifest, times: Sequence[float]) -> dict[str, list[Plan]]:
    """Return the plans that differ from this one in one setting, by its name; some may not fit the bundle.

    `times` are the timesteps of the plan.
    """
    kind = contract.process.kind
    solvers = [name for name, facts in SOLVERS.items() if kind in facts["processes"]]
    named = {name: value for name, value in plan.items() if name != "spacing" or value in FACTS["spacings"][kind]}
    changes: dict[str, list[Plan]] = {
        "steps": [{**named, "steps": plan["steps"] + move} for move in MOVES if plan["steps"] + move >= FEWEST],
        "solver": [{**plan, "solver": name} for name in solvers if name != plan["solver"]],
        "spacing": [{**plan, "spacing": name} for name in FACTS["spacings"][kind] if name != plan.get("spacing")],
    }
    if kind == "noise":  # of a flow, σ that are listed are not shifted
        changes["times"] = [
            {**plan, "steps": len(other), "spacing": ", ".join(f"{time:.0f}" for time in other)}
            for other in _times(times)
        ]
    if contract.mixes_guidance:
        changes[INTERVAL] = list(_intervals(plan))
        weight = plan.get("guidance", contract.guidance.default)
        changes["guidance"] = [{**plan, "guidance": round(factor * weight, 2)} for factor in WEIGHTS]
    without = {name: value for name, value in plan.items() if name not in CACHE_FIELDS}
    changes["cache"] = [other for other in (without, *({**without, **cache} for cache in CACHES)) if other != plan]
    return {name: plans for name, plans in changes.items() if plans}


def _times(times: Sequence[float]) -> Iterator[list[float]]:
    """Yield the times with one of them left out, or a third of the way to the next or the last one."""
    for index, time in enumerate(times):
        before, after = times[:index], times[index + 1 :]
        if len(times) > FEWEST:
            yield [*before, *after]
        for other in (times[index - 1] if index else None, times[index + 1] if after else 0.0):
            if other is not None:
                yield [*before, round(time + (other - time) / 3), *after]


def _intervals(plan: Plan) -> Iterator[Plan]:
    if INTERVAL not in plan:
        yield {**plan, INTERVAL: list(FIRST_INTERVAL)}
        return
    yield {name: value for name, value in plan.items() if name != INTERVAL}
    low, high = plan[INTERVAL]
    for move_low, move_high in ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1)):
        ends = [round(low + EDGE * move_low, 3), round(high + EDGE * move_high, 3)]
        if 0 <= ends[0] < ends[1] <= 1:
            yield {**plan, INTERVAL: ends}
