"""Conditions: arrays by port name, checked, padded and with their masks, and what guidance leads away from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle.records import Port
from dit_runtime.errors import UsageError, nearest

Condition = Mapping[str, NDArray[Any]]  # by port, rows first, as a user passes it
Rows = dict[str, NDArray[Any]]  # by port, every condition port, as the network takes it


def fit(condition: Condition, conditions: Sequence[Port], what: str = "condition") -> Rows:
    """Return every condition port's rows as the network takes them; refuse what does not fit.

    Ports that are masked are padded with zeros. A mask that is left out is 1 for each token that was passed.
    """
    ports = {port.name: port for port in conditions}
    for name in condition:
        if name not in ports:
            known = ", ".join(ports) or "none"
            raise UsageError(f"{what} has the unknown port {name!r}{nearest(str(name), ports)}; known: {known}")
    missing = [name for name, port in ports.items() if not port.masks and name not in condition]
    if missing:
        raise UsageError(f"{what} lacks {', '.join(missing)}; expected an array for each of {', '.join(ports)}")
    masks = {port.masks: port for port in ports.values() if port.masks}
    rows: Rows = {}
    for name, port in ports.items():
        if port.masks:
            continue
        values = _values(condition[name], port, f"{what}: {name}", shorter=name in masks)
        if name in masks:
            mask = masks[name]
            rows[mask.name] = _mask(condition.get(mask.name), values, mask, f"{what}: {mask.name}")
            values = _pad(values, port.shape[0])
        rows[name] = values
    counts = {name: len(values) for name, values in rows.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UsageError(f"{what}: numbers of rows differ: {shown}; expected one for all")
    return rows


def null_condition(conditions: Sequence[Port], null: Mapping[str, Any], negative: Condition | None) -> Rows:
    """Return what guidance leads away from: the user's `negative`, else the constants in `null`; one row, or more."""
    negative, ports = negative or {}, {port.name: port for port in conditions}
    missing = [name for name, port in ports.items() if not port.masks and name not in {*null, *negative}]
    if missing:
        raise UsageError(f"guidance needs negative= with {', '.join(missing)}, to lead away from; or pass guidance 1")
    arrays = [as_array(values, f"negative: {name}") for name, values in negative.items()]
    count = max((len(array) for array in arrays if array.ndim), default=1)
    constants = {
        name: np.full((count, *ports[name].shape), value, ports[name].dtype)
        for name, value in null.items()
        if name in ports and name not in negative and ports[name].masks not in negative
    }
    return fit({**constants, **negative}, conditions, "negative")


def unique_rows(rows: Rows, ports: Collection[str], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first row of each distinct one in these ports, byte for byte, and each row's number among these."""
    arrays = [np.ascontiguousarray(rows[name]) for name in sorted(ports)]
    numbers: dict[tuple[bytes, ...], int] = {}
    first: list[int] = []
    number_of_row: list[int] = []
    for row in range(count):
        number = numbers.setdefault(tuple(array[row].tobytes() for array in arrays), len(numbers))
        if number == len(first):
            first.append(row)
        number_of_row.append(number)
    return np.array(first, np.int64), np.array(number_of_row, np.int64)


def _values(values: Any, port: Port, what: str, shorter: bool) -> NDArray[Any]:
    """Return (N, *shape) in the port's type; where it may be `shorter`, of up to so many tokens."""
    array = as_array(values, what)
    fixed = 2 if shorter else 1  # the axes before those that must be equal
    tokens = array.shape[1] if shorter and array.ndim > 1 else 0
    fits = array.ndim == len(port.shape) + 1 and array.size and array.shape[fixed:] == port.shape[fixed - 1 :]
    if not fits or (shorter and tokens > port.shape[0]):
        sizes = ["rows", *map(str, port.shape)]
        if shorter:
            sizes[1] = f"up to {sizes[1]}"
        raise UsageError(f"{what} has shape {array.shape}; expected ({', '.join(sizes)})")
    if port.dtype == "int64":
        if array.dtype.kind not in "iub" or array.min() < 0 or array.max() >= port.size:
            raise UsageError(f"{what} holds other values than the integers from 0 to {port.size - 1}")
        return array.astype(np.int64)
    with np.errstate(over="ignore"):  # too big for float32 is inf, and refused as that
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UsageError(f"{what} holds values that are not finite")
    return array


def _mask(values: Any, masked: NDArray[Any], port: Port, what: str) -> NDArray[Any]:
    """Return (N, tokens) of 0 and 1, padded; a 1 for each token that was passed where the user has no mask."""
    expected = masked.shape[:2]
    mask = np.ones(expected) if values is None else as_array(values, what)
    if mask.shape != expected or not np.isin(mask, (0, 1)).all() or not mask.any(axis=1).all():
        raise UsageError(f"{what} has shape {mask.shape}; expected {expected} of 0 and 1, a 1 in every row")
    return _pad(mask, port.shape[0]).astype(port.dtype)


def as_array(values: Any, what: str) -> NDArray[Any]:
    """Return an array of what a user passed; refuse what holds no numbers."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise UsageError(f"{what} is no array; expected numbers") from None
    if array.dtype.kind not in "fiub":
        raise UsageError(f"{what} is {array.dtype}; expected numbers")
    return array


def _pad(values: NDArray[Any], tokens: int) -> NDArray[Any]:
    return np.pad(values, [(0, 0), (0, tokens - values.shape[1]), *[(0, 0)] * (values.ndim - 2)])


def group(count: int, condition: Rows, negative: Rows | None) -> tuple[Rows, NDArray[np.int64]]:
    """Return the rows of both, and the numbers of each sample's own row and of its negative; (G, count)."""
    own = np.arange(count)
    if negative is None:
        return condition, own[None]
    rows = {name: np.concatenate([condition[name], negative[name]]) for name in condition}
    several = len(next(iter(negative.values()))) > 1
    return rows, np.stack([own, count + (own if several else 0 * own)])
