"""Sort what a pipeline gives its transformer into state, time, condition and constant, and make a Network of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_export.networks.diffusers import Recording, Step
from dit_export.networks.strides import Indices, Strides, find_places, strides
from dit_runtime.bundle.records import GUIDANCE, PACKS, RESERVED, Port
from dit_runtime.errors import UsageError

CLOSE = 1e-4  # relative L2: fp32 sums in another order
WEIGHT = "guidance_scale"


class Runs(NamedTuple):
    """Runs of one pipeline that differ in one thing each from the first."""

    first: Recording
    prompt: Recording  # another prompt
    seed: Recording  # another seed, and one step more
    batch: Recording  # both prompts and both seeds
    unguided: Recording  # a weight of guidance of 1, and two steps more
    weight: float  # of guidance in the other runs

    @property
    def recordings(self) -> tuple[Recording, ...]:
        return self[:-1]


class Group(NamedTuple):
    """The arguments and results of a transformer for one of guidance's predictions, with a row for each sample."""

    inputs: Mapping[str, Any]
    output: Tensor


class Sorted(NamedTuple):
    """The names of a transformer's arguments by role; every other one is constant."""

    state: str
    times: tuple[str, ...]
    conditions: tuple[str, ...]
    weight: str  # that of guidance; "": none


@dataclass(frozen=True)
class Captured:
    """A transformer as its pipeline calls it."""

    transformer: Any
    runs: Runs

    @cached_property
    def rowed(self) -> frozenset[str]:
        """Return the names of the arguments that have a row for each row of the call."""
        calls = [run.steps[0].calls for run in (self.runs.first, self.runs.batch)]
        names = set()
        for once, twice in zip(*calls, strict=False):
            for name, value in once.inputs.items():
                wider = twice.inputs.get(name)
                shapes = [tuple(each.shape[:1]) for each in (value, wider) if isinstance(each, Tensor)]
                if shapes == [(len(once.output),), (2 * len(once.output),)]:
                    names.add(name)
        return frozenset(names)

    def groups(self, step: Step) -> list[Group]:
        """Return the calls of a step, those of both of guidance's predictions apart."""
        count, groups = len(step.sample), []
        for call in step.calls:
            if not isinstance(call.output, Tensor):
                raise UsageError(f"the transformer returns a {type(call.output).__name__}; expected a tensor")
            if len(call.output) % count:
                raise UsageError(f"the transformer gives {len(call.output)} rows for {count} samples: refused")
            for start in range(0, len(call.output), count):
                rows = slice(start, start + count)
                inputs = {name: value[rows] if name in self.rowed else value for name, value in call.inputs.items()}
                groups.append(Group(inputs, call.output[rows]))
        if len(groups) not in (1, 2):
            raise UsageError(
                f"unknown guidance: the transformer predicts {len(groups)} times for each sample and step; "
                "expected once, or twice as classifier-free guidance has it"
            )
        return groups

    @cached_property
    def conditional(self) -> int:
        """Return which of a guided step's groups reads the prompt."""
        both = [self.groups(run.steps[0]) for run in (self.runs.first, self.runs.prompt)]
        for group in (*both[0][1:], *both[1]):
            self._require_sizes(both[0][0], group)
        moved = [index for index, pair in enumerate(zip(*both, strict=True)) if _differ(pair[0].inputs, pair[1].inputs)]
        if len(both[0]) == 2 and len(moved) != 1:
            raise UsageError(f"unknown guidance: the prompt is read by {len(moved)} of 2 predictions; expected one")
        return moved[0] if moved else 0

    @property
    def guided(self) -> bool:
        return len(self.groups(self.runs.first.steps[0])) == 2

    def own(self, run: Recording, step: int = 0) -> Group:
        """Return the group of a step that reads the prompt."""
        groups, index = self.groups(run.steps[step]), self.conditional
        return groups[index if len(groups) == 2 else 0]

    def negative(self, run: Recording, step: int = 0) -> Group:
        return self.groups(run.steps[step])[1 - self.conditional]

    @cached_property
    def sorted(self) -> Sorted:
        """Sort arguments by what moves them: a step, a prompt, the weight of guidance, or nothing."""
        first, runs = self.own(self.runs.first), self.runs
        for other in (self.own(runs.first, 1), self.own(runs.unguided), self.own(runs.seed)):
            if some := sorted(filter(self._is_no_list, first.inputs.keys() ^ other.inputs.keys())):
                raise UsageError(f"{some[0]}: an argument of some calls only: refused")
        states: list[str] = []
        times: list[str] = []
        conditions: list[str] = []
        weights: list[str] = []
        for name, value in first.inputs.items():
            after, other = self.own(runs.first, 1).inputs[name], self.own(runs.prompt).inputs[name]
            if not _equal(value, after):
                self._require_moving_tensor(name, value)
                (times if value.numel() == 1 else states).append(name)
            elif not _equal(value, other) or (
                self.guided and not _equal(value, self.negative(runs.first).inputs[name])
            ):
                self._require_condition(name, value)
                conditions.append(name)
            elif not _equal(value, self.own(runs.unguided).inputs[name]):
                self._require_weight(name)
                weights.append(name)
            elif not _equal(value, self.own(runs.seed).inputs[name]):
                raise UsageError(f"{name} changes with the seed or the number of steps, and is no state: refused")
        for name in states:
            if self._place(name) is None:
                self._refuse_moving(name, first.inputs[name])
        for what, names in (("state", states), ("time", times)):
            if not names:
                raise UsageError(f"no argument of the transformer is a {what}: none moves from step to step as one")
        if len(states) > 1 or len(weights) > 1:
            raise UsageError(f"{', '.join(states if len(states) > 1 else weights)}: expected one argument of this role")
        return Sorted(states[0], tuple(times), tuple(conditions), weights[0] if weights else "")

    def _require_weight(self, name: str) -> None:
        """Refuse a weight of guidance that is not one number a run, or that mixes two predictions besides."""
        values = [self.own(run).inputs[name] for run in (self.runs.first, self.runs.unguided)]
        if self.guided:
            what = f"{name} changes with the weight of guidance, which mixes two predictions besides"
            raise UsageError(f"unknown guidance: {what}: refused")
        if not all(isinstance(value, Tensor) and value.unique().numel() == 1 for value in values):
            raise UsageError(f"unknown guidance: {name} changes with its weight, and is not one number: refused")

    def _require_sizes(self, one: Group, other: Group) -> None:
        """Refuse what has another shape, or another value of Python, for another prompt."""
        if some := sorted(one.inputs.keys() ^ other.inputs.keys()):
            raise UsageError(f"{some[0]}: an argument of some calls only: refused")
        for name, value in one.inputs.items():
            second = other.inputs[name]
            shapes = [[*each.shape] if isinstance(each, Tensor) else each for each in (value, second)]
            if isinstance(value, Tensor) and isinstance(second, Tensor) and shapes[0] != shapes[1]:
                what = f"{name} has the shape {shapes[0]} for one prompt and {shapes[1]} for another"
                raise UsageError(f"{what}: a data-dependent length, which no port has: refused")
            if not (isinstance(value, Tensor) and isinstance(second, Tensor)) and not _equal(value, second):
                raise UsageError(f"{name} is {shapes[0]!r} for one prompt and {shapes[1]!r} for another: refused")

    def _require_moving_tensor(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise UsageError(f"{name} is {type(value).__name__} of Python and changes from step to step: refused")
        self._require_no_list(name)

    def _is_no_list(self, name: str) -> bool:
        return not any(word.isdecimal() for word in name.split("."))

    def _require_no_list(self, name: str) -> None:
        if not self._is_no_list(name):
            raise UsageError(f"{name}: a tensor in a list, which no port holds: refused")

    def _require_condition(self, name: str, value: Any) -> None:
        self._require_no_list(name)
        if name not in self.rowed:
            raise UsageError(f"{name} changes with the prompt and has no row for each sample: refused")
        if not value.is_floating_point() and not ((value == 0) | (value == 1)).all():
            raise UsageError(f"{name} is a condition of whole numbers; expected floats, or a mask of 0 and 1: refused")

    def _refuse_moving(self, name: str, value: Tensor) -> None:
        times = value.unique().numel() <= 2
        what = "a time of its own for each token, which no port holds" if times else "neither the state nor a time"
        raise UsageError(f"{name} of shape {list(value.shape)} changes from step to step and is {what}: refused")

    @cached_property
    def noise(self) -> Tensor:
        """Return the draw from which the first run starts."""
        run = self.runs.first
        draw = next((draw for draw in run.draws if draw.numel() == run.steps[0].sample.numel()), None)
        if draw is None:
            raise UsageError("the first state is no draw of torch.randn: refused")
        seeded = torch.randn(draw.shape, generator=torch.Generator().manual_seed(run.seeds[0]))
        if not torch.equal(draw, seeded):
            raise UsageError("the first state is not the first draw of its seed: refused")
        return draw

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the state in the order in which noise is drawn."""
        shape = tuple(self.noise.shape)
        return shape[1:] if len(shape) > 1 and shape[0] == 1 else shape

    @cached_property
    def order(self) -> Indices:
        """Return where each element of the scheduler's state is in the noise."""
        size = self.noise.numel()
        rows = []
        for run in (self.runs.first, self.runs.seed):
            rows.append(next(draw for draw in run.draws if draw.numel() == size).flatten())
        target = _pair([run.steps[0].sample for run in (self.runs.first, self.runs.seed)])
        indices = find_places(target, _pair(rows))
        if indices is None or len(np.unique(indices)) != size:
            raise UsageError("the first state is not its noise in another order: refused")
        return indices

    def drawn(self, state: Tensor) -> Tensor:
        """Return a state or a prediction of the scheduler in the order in which noise is drawn."""
        return state.flatten(1)[:, torch.from_numpy(np.argsort(self.order))].reshape(-1, *self.shape)

    def _place(self, name: str) -> Indices | None:
        """Return where each element of an argument is in the scheduler's state; None where one is not there."""
        runs = self.runs.first, self.runs.seed
        return find_places(
            _pair([self.own(run).inputs[name] for run in runs]), _pair([run.steps[0].sample for run in runs])
        )

    @cached_property
    def state_view(self) -> Strides:
        """Return how the state becomes the transformer's argument."""
        name = self.sorted.state
        places = self._place(name)
        assert places is not None
        return self._view(self.order[places], self.shape, self.own(self.runs.first).inputs[name].shape[1:], name)

    @cached_property
    def prediction_view(self) -> tuple[Strides, float]:
        """Return how the transformer's result becomes a prediction, and its sign."""
        run = self.runs.unguided if self.guided else self.runs.first
        if len(self.groups(run.steps[0])) != 1:
            raise UsageError("unknown guidance: with a weight of 1 the transformer still predicts twice")
        outputs = [self.own(run, step).output for step in (0, 1)]
        for sign in (1.0, -1.0):
            places = find_places(_pair([sign * run.steps[step].prediction for step in (0, 1)]), _pair(outputs))
            if places is not None:
                shape = tuple(outputs[0].shape[1:])
                return self._view(places[np.argsort(self.order)], shape, self.shape, "the result"), sign
        raise UsageError("what the scheduler takes is not the transformer's result, nor a part of it: refused")

    def _view(self, places: Indices, source: Sequence[int], shape: Sequence[int], name: str) -> Strides:
        view = strides(places, tuple(source), tuple(shape))
        if view is None:
            raise UsageError(f"{name} is the state in an order that is no transposition of axes: refused")
        return view

    def condition_ports(self) -> dict[str, Port]:
        """Return the condition ports by argument."""
        values = {name: self.own(self.runs.first).inputs[name] for name in self.sorted.conditions}
        ports = {}
        for name, value in values.items():
            masks = ""
            both = torch.cat([value, self.own(self.runs.prompt).inputs[name]])
            if value.ndim == 2 and ((both == 0) | (both == 1)).all():
                masked = [key for key, each in values.items() if each.ndim > 2 and each.shape[1] == value.shape[1]]
                masks = port_name(masked[0]) if len(masked) == 1 else ""
            ports[name] = Port(port_name(name), "condition", "float32", tuple(value.shape[1:]), masks=masks)
        if self.sorted.weight:
            ports[self.sorted.weight] = Port(WEIGHT, "condition", "float32", ())
        return ports

    def require_constants(self, group: Group) -> None:
        """Refuse a call for another prompt whose constants are not those of the recorded runs."""
        first, moving = self.own(self.runs.first).inputs, {self.sorted.state, *self.sorted.times, self.sorted.weight}
        for name, value in group.inputs.items():
            shapes = [getattr(each, "shape", None) for each in (value, first[name])]
            same = shapes[0] == shapes[1] if name in self.sorted.conditions else _equal(value, first[name])
            if name not in moving and not same:
                what = f"{name} is a constant of the bundle, and another one for this prompt"
                raise UsageError(f"{what}; build it again with more --caption-tokens")


def port_name(argument: str) -> str:
    """Return what a port may be called after an argument."""
    name = argument.replace(".", "_")
    return f"{name}_input" if name in (*RESERVED, *PACKS.values(), GUIDANCE) else name


def distance(got: Tensor, expected: Tensor) -> float:
    """Return the relative L2 distance."""
    return float((got - expected).norm() / expected.norm())


def _pair(values: Sequence[Tensor]) -> NDArray[np.float32]:
    return np.stack([value.float().flatten().numpy() for value in values])


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return any(not _equal(value, other[name]) for name, value in one.items())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one is other or one == other)
