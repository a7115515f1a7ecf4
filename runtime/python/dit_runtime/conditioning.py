"""The conditioning table: each unique (t, label) of a run goes through the conditioner once."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Conditioner = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[Any]]

TABLE_BYTES = 256 << 20  # of XL/2's 783 kB a (t, label) that is 342


class Table:
    """Rows for the run's steps in windows that stay below the budget, whatever the number of steps and labels.

    A `whole` table is filled once; over the budget it lives in a temporary file instead of in memory.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        timesteps: Sequence[float],
        labels: Sequence[int],
        null_label: int | None,
        row_bytes: int,
        max_rows: int,
        budget: int = TABLE_BYTES,
        whole: bool = False,
    ) -> None:
        self._conditioner = conditioner
        self._times, self._time_of_step = np.unique(np.asarray(timesteps, np.float32), return_inverse=True)
        wanted = list(labels) + ([] if null_label is None else [null_label])
        self._labels, self._label_of_row = np.unique(np.asarray(wanted, np.int64), return_inverse=True)
        self._guided = null_label is not None
        self._chunk = max_rows
        self._budget, self._whole = budget, whole
        fit = max(1, budget // (row_bytes * len(self._labels)))
        self._window = len(self._times) if whole else fit  # timesteps held at a time
        self._rows: dict[int, NDArray[Any]] = {}  # by timestep: (labels, K, D)

    def __call__(self, step: int, samples: slice) -> NDArray[Any]:
        """[G, B, K, D] for some of the samples at a step: their labels first, then the null label."""
        time = int(self._time_of_step[step])
        if time not in self._rows:
            self._fill(step)
        rows = self._rows[time]
        own = rows[self._label_of_row[: len(self._label_of_row) - self._guided][samples]]
        if not self._guided:
            return own[None]
        null = np.broadcast_to(rows[self._label_of_row[-1]], own.shape)
        return np.stack([own, null])

    def _fill(self, step: int) -> None:
        """Replaces the window by the timesteps from `step` on."""
        times = list(dict.fromkeys(self._time_of_step[step:]))[: self._window]
        pairs = [(time, label) for time in times for label in range(len(self._labels))]
        self._rows.clear()
        rows: NDArray[Any] = np.empty(0)
        for first in range(0, len(pairs), self._chunk):
            which = np.array(pairs[first : first + self._chunk])
            part = self._conditioner(self._times[which[:, 0]], self._labels[which[:, 1]])
            if not first:
                rows = self._allocate((len(pairs), *part.shape[1:]), part.dtype)
            rows[first : first + len(part)] = part
        for index, time in enumerate(times):
            self._rows[int(time)] = rows[index * len(self._labels) : (index + 1) * len(self._labels)]

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        if not self._whole or math.prod(shape) * dtype.itemsize <= self._budget:
            return np.empty(shape, dtype)
        with tempfile.TemporaryFile() as file:  # its space is given back with the array
            return np.memmap(file, dtype, "w+", shape=shape)
