"""The conditioning table: each unique (t, label) of a run goes through the conditioner once."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Conditioner = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[Any]]
Put = Callable[[NDArray[Any]], Any]  # to where the network reads it

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
        put: Put = np.asarray,
    ) -> None:
        self._conditioner, self._put = conditioner, put
        self._times, self._time_of_step = np.unique(np.asarray(timesteps, np.float32), return_inverse=True)
        wanted = list(labels) + ([] if null_label is None else [null_label])
        self._labels, self._label_of_row = np.unique(np.asarray(wanted, np.int64), return_inverse=True)
        self._guided = null_label is not None
        self._chunk = max_rows
        self._budget, self._whole = budget, whole
        fit = max(1, budget // (row_bytes * len(self._labels)))
        self._window = len(self._times) if whole else fit  # timesteps held at a time
        self._first: dict[int, int] = {}  # by timestep: its first row
        self._rows: Any = None  # (timesteps * labels, K, D)

    def __call__(self, step: int, samples: slice) -> Any:
        """[G, B, K, D] for some of the samples at a step: their labels first, then the null label."""
        time = int(self._time_of_step[step])
        if time not in self._first:
            self._fill(step)
        own = self._label_of_row[: len(self._label_of_row) - self._guided][samples]
        groups = [own, np.full_like(own, self._label_of_row[-1])] if self._guided else [own]
        return self._rows[self._first[time] + np.stack(groups)]

    def _fill(self, step: int) -> None:
        """Replaces the window by the timesteps from `step` on."""
        times = list(dict.fromkeys(self._time_of_step[step:]))[: self._window]
        pairs = [(time, label) for time in times for label in range(len(self._labels))]
        self._rows = None  # before there is another
        rows: NDArray[Any] = np.empty(0)
        for first in range(0, len(pairs), self._chunk):
            which = np.array(pairs[first : first + self._chunk])
            part = self._conditioner(self._times[which[:, 0]], self._labels[which[:, 1]])
            if not first:
                rows = self._allocate((len(pairs), *part.shape[1:]), part.dtype)
            rows[first : first + len(part)] = part
        self._first = {int(time): index * len(self._labels) for index, time in enumerate(times)}
        self._rows = self._put(rows)

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        if not self._whole or math.prod(shape) * dtype.itemsize <= self._budget:
            return np.empty(shape, dtype)
        with tempfile.TemporaryFile() as file:  # its space is given back with the array
            return np.memmap(file, dtype, "w+", shape=shape)
