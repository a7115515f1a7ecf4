"""A little work at the batch sizes of later requests, so that the first of these waits for no compiler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from dit_runtime.bundle.records import LABELS, Manifest
from dit_runtime.conditions.condition import Rows
from dit_runtime.engines import Engines
from dit_runtime.errors import NotFinite, UsageError
from dit_runtime.facts import DEFAULT_GUIDANCE
from dit_runtime.request import Request
from dit_runtime.run import Run
from dit_runtime.sampling.noise import Noise
from dit_runtime.sampling.process import is_integer
from dit_runtime.sampling.solvers import plan

EVALUATIONS = 2  # the second one of a shape is what a GPU's backend records


def require(manifest: Manifest, batches: Sequence[int], low_memory: bool) -> None:
    """Refuse batch sizes that no stage runs at, and warming of what does not stay open."""
    largest = manifest.step.max_batch
    for batch in batches:
        if not is_integer(batch) or not 1 <= batch <= largest:
            raise UsageError(f"warm has {batch!r}; expected batch sizes from 1 to {largest}, where requests are split")
    if batches and low_memory:
        raise UsageError("got both warm and low_memory, which keeps no engine open: pass one of them")


def warm(engines: Engines, batches: Sequence[int]) -> None:
    """Begin a run at each batch size, with guidance and without, and decode what it has reached."""
    contract = engines.manifest
    for batch in batches:
        condition = made_up(contract, batch)
        negative = {name: rows[:1] for name, rows in condition.items()}
        for guidance in (DEFAULT_GUIDANCE, 1.0) if contract.mixes_guidance else (None,):
            guided = guidance != 1 and contract.without_null
            request = Request(
                condition=condition,
                negative=negative if guided else None,
                steps=_steps(contract),
                guidance=guidance,
                seed=[*range(batch)],
                output="latents",
            )
            run = Run(engines, request)
            with suppress(NotFinite):  # numbers that are made up may leave the range of a narrow type
                for _ in range(EVALUATIONS):
                    run.step()
            if contract.end is not None:
                with suppress(NotFinite):
                    engines.decode(run.state)


def _steps(contract: Manifest) -> int:
    """Return the largest number of steps up to its default that the bundle's schedule has."""
    process = contract.process
    for steps in range(min(process.sampler.steps, process.train_steps), 1, -1):
        try:
            plan(process, process.sampler.solver, steps)
        except UsageError:
            continue
        return steps
    return 1


def made_up(manifest: Manifest, count: int) -> Rows:
    """Return a condition of made-up numbers, all tokens counted, without guidance; labels one after the other.

    A bundle that takes prompts gets token ids, so that its prompt stage runs too.
    """
    rows: Rows = {}
    masks = {prompt.mask for prompt in manifest.prompts}
    for number, port in enumerate((*manifest.prompt_ports, *manifest.ports_beside_prompts)):
        if port.name == manifest.guidance.port:
            continue
        shape = (count, *port.shape)
        if port.masks or port.name in masks:
            rows[port.name] = np.ones(shape, port.dtype)
        elif port.dtype == "int64":
            values = np.arange(math.prod(shape)) % max(1, manifest.classes if port.name == LABELS else port.size)
            rows[port.name] = values.reshape(shape)
        else:
            rows[port.name] = Noise(number).normal(shape)
    return rows
