"""A memo of the stages before the loop that all requests share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle.records import Stage
from dit_runtime.conditions.memo import BUDGET

Outputs = Mapping[str, NDArray[Any]]
Compute = Callable[[Stage, Mapping[str, NDArray[Any]]], Outputs]


class SharedMemo:
    """Each row of a stage's inputs is computed once, whichever request it belongs to; what was not used for the longest
    time goes first.

    A row is known by the hash of its bytes, 128 bits long, so that the embeddings of captions need not be held.
    """

    def __init__(self, compute: Compute, budget: int = BUDGET) -> None:
        self._compute, self._budget = compute, budget
        self._rows: OrderedDict[bytes, tuple[NDArray[Any], ...]] = OrderedDict()
        self.bytes = self.hits = self.misses = 0

    def __call__(self, stage: Stage, inputs: Mapping[str, Any], *into: Mapping[str, Any]) -> Outputs:
        """Return a stage's outputs; those that stay on a device are computed anew."""
        if into:
            return self._compute(stage, inputs, *into)
        arrays = [np.ascontiguousarray(inputs[spec.name]) for spec in stage.reads]
        names = [spec.name for spec in stage.gives]
        keys = [_key(stage.name, arrays, row) for row in range(len(arrays[0]))]
        known = {key: self._rows[key] for key in keys if key in self._rows}
        first = {key: row for row, key in reversed([*enumerate(keys)]) if key not in known}
        self.misses += len(first)
        self.hits += len(keys) - len(first)
        if first:
            rows = [*first.values()]
            outputs = self._compute(
                stage, {spec.name: array[rows] for spec, array in zip(stage.reads, arrays, strict=True)}
            )
            for number, key in enumerate(first):
                known[key] = tuple(outputs[name][number].copy() for name in names)
        for key in keys:
            self._keep(key, known[key])
        return {name: np.stack([known[key][place] for key in keys]) for place, name in enumerate(names)}

    def _keep(self, key: bytes, row: tuple[NDArray[Any], ...]) -> None:
        if key not in self._rows:
            self._rows[key] = row
            self.bytes += sum(part.nbytes for part in row)
        self._rows.move_to_end(key)
        while self.bytes > self._budget:
            _, gone = self._rows.popitem(last=False)
            self.bytes -= sum(part.nbytes for part in gone)


def _key(stage: str, arrays: list[NDArray[Any]], row: int) -> bytes:
    key = blake2b(stage.encode(), digest_size=16)
    for array in arrays:
        key.update(array[row].tobytes())
    return key.digest()
