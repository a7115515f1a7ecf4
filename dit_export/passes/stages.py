"""Stages: the hoist applied twice, by the state and then by the time, and what crosses grouped by what it depends on.

    context    = what depends on conditions alone         runs: condition       once a condition
    modulation = what depends on the timestep alone       runs: time            once a timestep
    conditioner = what depends on both                    runs: time+condition  once a timestep and condition
    denoiser   = the loop                                 runs: step

What the conditioner makes of conditions alone moves into the context where that takes at least `SPLIT` bytes of weights
out of it. So a pooled prompt is projected once a prompt, and a label's row is read where it is added.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import onnx_graphsurgeon as gs

from dit_export.passes.cut import Cut, cut
from dit_export.passes.dependence import dependents, extract, row_counts, row_dimensions
from dit_export.passes.pack import Pack, give, plan, take
from dit_runtime.bundle.records import PACKS, Port

SPLIT = 1_000_000  # bytes: the price of a stage of its own
NAMES = {"condition": "context", "time": "modulation", "time+condition": "conditioner"}


class Stage(NamedTuple):
    name: str
    runs: str
    graph: gs.Graph  # ports and packs of earlier stages -> packs
    packs: tuple[Pack, ...]


class Staged(NamedTuple):
    stages: tuple[Stage, ...]
    denoiser: gs.Graph  # the state, packs, ports that it reads as they are -> outputs
    cut: Cut


def split_stages(graph: gs.Graph, ports: Sequence[Port]) -> Staged:
    """Split the plain graph, whose inputs are the ports."""
    (state,), (time,) = ([port.name for port in ports if port.role == role] for role in ("state", "time"))
    conditions = [port.name for port in ports if port.role == "condition"]
    shared = row_dimensions(graph.inputs)
    counts = row_counts(graph, shared)
    timed, conditioned = dependents(graph, [time], counts), dependents(graph, conditions, counts)
    loop = cut(graph, [state], [time])

    made: dict[str, list[str]] = {runs: [] for runs in NAMES}
    for name in loop.crossing:
        roles = [role for role, reached in (("time", timed), ("condition", conditioned)) if name in reached]
        made["+".join(roles)].append(name)
    reads = {"condition": conditions, "time": [time], "time+condition": [time, *conditions]}
    moved = _moved(graph, time, conditions, made["time+condition"], shared)
    if moved:
        reads["time+condition"] = [time, *moved.direct, *moved.crossing]
        made["condition"] += [name for name in moved.crossing if name not in made["condition"]]

    parts = {runs: extract(graph, reads[runs], names, shared) for runs, names in made.items() if names}
    outputs = [tensor.name for tensor in graph.outputs]
    denoiser = extract(graph, [state, *loop.direct, *loop.crossing], outputs, shared)
    stages = []
    for runs, part in parts.items():
        readers = [reader for reader in (denoiser, *parts.values()) if reader is not part]
        packs = _packs(part, PACKS[runs], readers)
        for pack in packs:
            give(part, pack)
            for reader in readers:
                take(reader, pack)
        stages.append(Stage(NAMES[runs], runs, part, tuple(packs)))
    return Staged(tuple(stages), denoiser, loop)


def _moved(
    graph: gs.Graph, time: str, conditions: list[str], outputs: list[str], shared: Collection[str]
) -> Cut | None:
    """Return the cut of what makes `outputs` by the time, where it is worth a stage."""
    if not outputs:
        return None
    early = cut(extract(graph, [time, *conditions], outputs, shared), [time])
    return early if early.weights - early.bytes >= SPLIT else None


def _packs(part: gs.Graph, name: str, readers: Sequence[gs.Graph]) -> list[Pack]:
    """Return the packs of the part's outputs; those that other graphs read travel apart."""
    groups: dict[tuple[bool, ...], list[gs.Variable]] = {}
    for tensor in part.outputs:
        used = tuple(any(entry.name == tensor.name for entry in reader.inputs) for reader in readers)
        groups.setdefault(used, []).append(tensor)
    return plan(name, list(groups.values()))
