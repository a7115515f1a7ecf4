"""Inputs that a bundle's own stages give its step stage, one row at a time and in host memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dit_runtime.conditions.condition import Rows
from dit_runtime.conditions.memo import open_sources
from dit_runtime.engines import Engines


def step_rows(engines: Engines, timesteps: NDArray[np.float32], condition: Rows) -> Rows:
    """Return by name what the step stage reads but the state and guidance, (rows, ...), at a timestep for each row."""
    contract, rows = engines.manifest, np.arange(len(timesteps))
    distinct, times = np.unique(timesteps, return_inverse=True)
    whole = engines.options.low_memory
    sources = open_sources(contract, engines.run, distinct, condition, len(rows), whole=whole)
    return {spec.name: sources[spec.name].take(times, rows) for spec in contract.step.grouped}


def grouped(engines: Engines, timesteps: NDArray[np.float32], condition: Rows, null: Rows) -> Rows:
    """Return the same for the condition and for the null row, (G, B, ...); without one, for the condition alone."""
    groups = [step_rows(engines, timesteps, condition)]
    if null:
        repeated = {name: np.broadcast_to(rows, condition[name].shape) for name, rows in null.items()}
        groups.append(step_rows(engines, timesteps, repeated))
    return {name: np.stack([group[name] for group in groups]) for name in groups[0]}
