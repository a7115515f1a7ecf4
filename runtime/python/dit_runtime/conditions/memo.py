"""Memos of the stages before the loop: each runs once per key, a timestep, a distinct condition, or both."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle.records import GUIDANCE, Manifest, Stage
from dit_runtime.conditions.condition import Rows, unique_rows
from dit_runtime.facts import CONSTANTS
from dit_runtime.sampling.guidance import Groups

BUDGET: int = CONSTANTS["memo_bytes"]  # of a memo; of XL/2's 783 kB a (timestep, label) that is 342
Numbers = NDArray[np.int64]
Compute = Callable[..., Mapping[str, NDArray[Any]]]  # stage, inputs, and where outputs go if they stay on a device


class Device(NamedTuple):
    """The memory that the step stage reads its inputs from; its arrays are indexed as NumPy's."""

    put: Callable[[NDArray[Any]], Any]
    empty: Callable[[tuple[int, ...], np.dtype[Any]], Any]
    joins: Callable[[Stage], bool]  # whether a stage's engine can write there


def always(time: int) -> range:
    return range(sys.maxsize)


class Source(NamedTuple):
    """The rows of a tensor, by the indices of their timesteps and of their conditions."""

    at: Callable[[int | Numbers, Numbers], Any]  # rows of any shape R, and timesteps of one window -> [*R, *row]
    timed: bool  # whether it depends on the timestep
    ports: frozenset[str]  # the condition ports that it depends on
    window: Callable[[int], range] = always  # the timesteps that are there together with this one

    def take(self, times: Numbers, rows: Numbers) -> Any:
        """Return [N, *row] of (N,) timesteps and (N,) rows; on the device where one window there has all of them."""
        parts, first = [], 0
        while first < len(times):
            window = self.window(int(times[first]))
            others = np.flatnonzero((times < window.start) | (times >= window.stop))
            end = min((int(place) for place in others if place > first), default=len(times))
            parts.append(self.at(times[first:end], rows[first:end]))
            first = end
        return parts[0] if len(parts) == 1 else np.concatenate([np.asarray(part) for part in parts])


class Memo:
    """The outputs of one stage by key, in windows of timesteps that stay below the budget.

    A `whole` memo is filled once; above the budget, a temporary file holds it instead of memory. With a `device`,
    the stage's engine writes its rows there, if it can.
    """

    def __init__(
        self,
        stage: Stage,
        compute: Compute,
        sources: Mapping[str, Source],
        times: int,
        conditions: Rows,
        count: int,
        *,
        device: Device | None = None,
        budget: int = BUDGET,
        whole: bool = False,
    ) -> None:
        """Run nothing yet; `times` is the number of distinct timesteps, `count` that of condition rows."""
        self._stage, self._compute = stage, compute
        self._sources = {spec.name: sources[spec.name] for spec in stage.reads}
        self._device, self._budget, self._whole = device, budget, whole
        self.timed = any(source.timed for source in self._sources.values())
        self.ports = frozenset().union(*(source.ports for source in self._sources.values()))
        self._first, self._number = unique_rows(conditions, self.ports, count)
        self._times = times if self.timed else 1
        row_bytes = sum(
            np.dtype(spec.dtype).itemsize * math.prod(int(size) for size in spec.shape[1:]) for spec in stage.gives
        )
        fit = max(1, budget // (row_bytes * len(self._first)))
        self._size = self._times if whole else fit  # timesteps held at a time
        self._window = range(0)
        self._values: dict[str, Any] = {}  # by output: (timesteps * distinct rows, *row)

    @property
    def sources(self) -> dict[str, Source]:
        how = self.timed, self.ports, self.window
        return {spec.name: Source(partial(self.at, spec.name), *how) for spec in self._stage.gives}

    def window(self, time: int) -> range:
        """Fill the window that has a timestep, if it is not there."""
        time = time if self.timed else 0
        if time not in self._window:
            self._fill(0 if self._whole else time)
        return self._window if self.timed else always(time)

    def at(self, name: str, times: int | Numbers, rows: Numbers) -> Any:
        self.window(int(np.min(times)))
        first = (times - self._window.start) * len(self._first) if self.timed else 0
        return self._values[name][first + self._number[rows]]

    def _fill(self, start: int) -> None:
        """Replace the window by the timesteps from `start` on."""
        self._values, self._window = {}, range(0)  # before there are others
        window = range(start, min(start + self._size, self._times))
        times, rows = np.repeat(np.array(window), len(self._first)), np.tile(self._first, len(window))
        device, values = self._device, dict[str, Any]()
        joined = device if device is not None and device.joins(self._stage) else None
        if joined is not None:
            for spec in self._stage.gives:
                shape = len(times), *map(int, spec.shape[1:])
                values[spec.name] = joined.empty(shape, np.dtype(spec.dtype))
        for first in range(0, len(times), self._stage.max_batch):
            some = slice(first, first + self._stage.max_batch)
            inputs = {name: source.take(times[some], rows[some]) for name, source in self._sources.items()}
            if joined is not None:
                self._compute(self._stage, inputs, {name: part[some] for name, part in values.items()})
                continue
            outputs = self._compute(self._stage, inputs)
            if not values:
                values = {spec.name: self._allocate(len(times), outputs[spec.name]) for spec in self._stage.gives}
            for name, part in values.items():
                part[some] = outputs[name]
        if device is not None and joined is None and self.timed:  # what no step changes, StepInputs sends
            values = {name: device.put(part) for name, part in values.items()}
        self._values = values
        self._window = window

    def _allocate(self, count: int, part: NDArray[Any]) -> NDArray[Any]:
        shape = (count, *part.shape[1:])
        if not self._whole or math.prod(shape) * part.dtype.itemsize <= self._budget:
            return np.empty(shape, part.dtype)
        with tempfile.TemporaryFile() as file:  # its space is given back with the array
            return np.asarray(np.memmap(file, part.dtype, "w+", shape=shape))


def open_sources(
    manifest: Manifest, compute: Compute, timesteps: NDArray[Any], conditions: Rows, count: int, **options: Any
) -> dict[str, Source]:
    """Return every tensor that a stage may read but the state, by name.

    `timesteps` are distinct, in the order in which they are asked for; `count` is the number of condition rows.
    """
    times = timesteps.astype(np.float32)

    def at_condition(name: str, numbers: int | Numbers, rows: Numbers) -> Any:
        return conditions[name][rows]

    def at_time(numbers: int | Numbers, rows: Numbers) -> Any:
        return np.full(rows.shape, times[numbers])

    sources = {name: Source(partial(at_condition, name), False, frozenset({name})) for name in conditions}
    sources[manifest.time.name] = Source(at_time, True, frozenset())
    for stage in manifest.before_loop:
        sources |= Memo(stage, compute, sources, len(times), conditions, count, **options).sources
    return sources


class StepInputs:
    """The step stage's inputs but the state, for some samples at a step of a run."""

    def __init__(
        self,
        manifest: Manifest,
        compute: Compute,
        timesteps: NDArray[Any],
        conditions: Rows,
        groups: Numbers,
        weights: NDArray[np.float32],
        *,
        device: Device | None = None,
        **options: Any,
    ) -> None:
        """Open the memos. `groups` has numbers of condition rows, (G, B): each sample's own, then its negative's."""
        times = np.asarray(timesteps, np.float32).tolist()
        distinct = {time: number for number, time in enumerate(dict.fromkeys(times))}
        self._time_of_step = [distinct[time] for time in times]
        count = int(groups.max()) + 1
        sources = open_sources(manifest, compute, np.array([*distinct]), conditions, count, device=device, **options)
        self._sources = {spec.name: sources[spec.name] for spec in manifest.step.grouped}
        self._groups, self._device = groups, device
        self._weights = {GUIDANCE: device.put(weights) if device else weights} if manifest.mixes_guidance else {}
        self.conditions, self._count = conditions, count
        self._resident: dict[str, tuple[Any, Numbers]] = {}  # distinct rows on the device, and each row's number
        self._held: tuple[tuple[slice, Groups] | None, dict[str, Any]] = None, {}

    def numbers(self, groups: Groups) -> Numbers:
        """Return the numbers of condition rows that a step reads, (G, B)."""
        if groups is Groups.OWN:
            return self._groups[:1]
        return self._groups.reshape(1, -1) if groups is Groups.APART else self._groups

    def __call__(self, step: int, samples: slice, groups: Groups = Groups.BOTH) -> dict[str, Any]:
        """Return [G, B, *row] by name for some samples of these groups; guidance is [B].

        What does not change with the step is held for the last samples only: of XL/2's captions it is 62 MB a sample. A
        run that fits the engine always asks for the same samples.
        """
        time, rows = self._time_of_step[step], self.numbers(groups)[:, samples]
        if self._held[0] != (samples, groups):
            self._held = None, {}  # before there are others
            held = {name: self._untimed(name, rows) for name, source in self._sources.items() if not source.timed}
            chosen: Any = samples
            if groups is Groups.APART:  # a negative has its sample's weight
                chosen = (np.arange(self._groups.size) % self._groups.shape[1])[samples]
            weights = {name: values[chosen] for name, values in self._weights.items()}
            self._held = (samples, groups), held | weights
        timed = {name: source.at(time, rows) for name, source in self._sources.items() if source.timed}
        return {**self._held[1], **timed}

    def _untimed(self, name: str, rows: Numbers) -> Any:
        """Return rows of what does not change with the step; a device gets all distinct ones, once a run."""
        source = self._sources[name]
        if self._device is None:
            return source.at(0, rows)
        if name not in self._resident:
            first, number = unique_rows(self.conditions, source.ports, self._count)
            values = source.at(0, first)
            self._resident[name] = self._device.put(values) if isinstance(values, np.ndarray) else values, number
        values, number = self._resident[name]
        return values[number[rows]]


def side_by_side(parts: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """Join the step stage's inputs of several calls: [G, B, *row] by name, and guidance [B]."""
    if len(parts) == 1:
        return {name: np.asarray(values) for name, values in parts[0].items()}
    return {
        name: np.concatenate([np.asarray(part[name]) for part in parts], axis=0 if name == GUIDANCE else 1)
        for name in parts[0]
    }
