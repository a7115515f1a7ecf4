"""Conditions to measure with: a user's own, as a text encoder embedded them, beside the fixtures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dit_export.arrays import read_arrays
from dit_export.networks import Network, fixtures
from dit_runtime.conditions.condition import Condition, fit, null_condition
from dit_runtime.errors import UsageError

FILE = "conditions as .npz, arrays by the names of the network's ports"
NEGATIVE = "negative."  # begins the names of what guidance leads away from


class Prompts(NamedTuple):
    condition: Condition
    negative: Condition  # one row


def read(path: Path, network: Network) -> Prompts:
    """Read the arrays of the condition ports by name, and `negative.NAME`; without negative ones take the fixtures'.

    A port for the weight of guidance may be left out.
    """
    arrays = read_arrays(path, FILE)
    if "" in arrays:
        raise UsageError(f"{path}: one array without a name; expected {FILE}")
    known = [prefix + port.name for prefix in ("", NEGATIVE) for port in network.conditions]
    if unknown := [name for name in arrays if name not in known]:
        raise UsageError(f"{path}: unknown array {unknown[0]!r}; known: {', '.join(known)}")
    negative = {name.removeprefix(NEGATIVE): rows for name, rows in arrays.items() if name.startswith(NEGATIVE)}
    condition = {name: rows for name, rows in arrays.items() if not name.startswith(NEGATIVE)}
    return make_prompts(network, condition, negative, f"{path}")


def make_prompts(network: Network, condition: Condition, negative: Condition, where: str) -> Prompts:
    """Check arrays against a network's ports; without negative ones take the fixtures'. Errors begin with `where`."""
    try:
        null = null_condition(network.conditions, network.null, negative) if negative else fixtures.null(network)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    count = len(next(iter(null.values())))
    if count != 1:
        raise UsageError(f"{where}: {count} negative conditions; expected one")
    weight = network.guidance_port
    ports = [port for port in network.conditions if port.name != weight or weight in condition]
    rows = fit(condition, ports, where)
    if weight and weight not in rows:
        count = max((len(values) for values in rows.values()), default=1)
        rows[weight] = np.full(count, network.guidance, np.float32)
    return Prompts(rows, null)


def batches(network: Network, own: Prompts | None, pictures: int, batch: int) -> Iterator[Prompts]:
    """Yield the conditions of `pictures` pictures, `batch` at a time.

    A user's own are spread evenly over all batches but the last. The last has fixtures, with which the gates check.
    """
    count = (pictures - 1) // batch * batch if own is not None else 0
    made = Prompts(fixtures.conditions(network, pictures), fixtures.null(network))
    for first in range(0, pictures, batch):
        rows = np.arange(first, min(first + batch, pictures))
        if own is not None and first < count:
            total = len(next(iter(own.condition.values())))
            yield Prompts(_rows(own.condition, rows * total // count), own.negative)
        else:
            yield Prompts(_rows(made.condition, rows), made.negative)


def _rows(condition: Mapping[str, np.ndarray], which: np.ndarray) -> Condition:
    return {name: rows[which] for name, rows in condition.items()}
