"""A captured transformer as a Network: the module that calls it, and the proof that it does as its pipeline did."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dit_export.networks import Network, mixing, rules
from dit_export.networks.captured import CLOSE, Captured, Group, distance, port_name
from dit_export.networks.diffusers import Recording
from dit_runtime.bundle.records import Port
from dit_runtime.errors import UsageError
from dit_runtime.sampling.process import Process
from dit_runtime.sampling.solvers import plan

EXACT = 1e-5  # relative: a time that is rounded on its way


class Caller(nn.Module):
    """Call a transformer as its pipeline does: named ports in, what the scheduler takes out."""

    def __init__(
        self,
        captured: Captured,
        ports: Sequence[Port],
        conditions: Mapping[str, str],
        times: Mapping[str, tuple[float, float]],
    ) -> None:
        """State ports by argument; `times` has factor and offset: the transformer reads factor · time + offset."""
        super().__init__()
        self.transformer = captured.transformer
        self.state, self.time = (port.name for port in ports[:2])
        self.conditions, self.times = dict(conditions), dict(times)
        self.state_argument, self.state_view = captured.sorted.state, captured.state_view
        self.weight, self.factor = captured.sorted.weight, mixing.weight_factor(captured)
        self.prediction_view, self.sign = captured.prediction_view
        self.nesting = captured.runs.first.steps[0].calls[0].nesting
        self.rowed = captured.rowed
        self.values = dict(captured.own(captured.runs.first).inputs)  # of constants; of others, their type and rank
        for number, value in enumerate(self.values.values()):
            if isinstance(value, Tensor):
                value = value.float() if value.is_floating_point() else value
                self.register_buffer(f"constant_{number}", value, persistent=False)

        def forward(**inputs: Tensor) -> Tensor:
            return self.call(inputs)

        # The tracer names inputs by the signature, which only the ports can say. A frozen weight is no input.
        optional = {conditions.get(self.weight): None}
        parameters = [
            inspect.Parameter(
                port.name, inspect.Parameter.KEYWORD_ONLY, default=optional.get(port.name, inspect.Parameter.empty)
            )
            for port in ports
        ]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward

    def call(self, inputs: Mapping[str, Tensor]) -> Tensor:
        values = [self.argument(name, number, inputs) for number, name in enumerate(self.values)]
        output = self.transformer(**pytree.tree_unflatten(values, self.nesting))
        prediction = self.prediction_view(output if isinstance(output, Tensor) else output[0])
        return prediction if self.sign == 1 else self.sign * prediction

    def argument(self, name: str, number: int, inputs: Mapping[str, Tensor]) -> object:
        """Return an argument of the transformer, with as many rows as the inputs have."""
        value, time = self.values[name], inputs[self.time]
        if not isinstance(value, Tensor):
            return value
        if name == self.state_argument:
            return self.state_view(inputs[self.state]).to(value.dtype)
        if name in self.times:
            factor, offset = self.times[name]
            moved = (factor * time + offset).reshape(-1, *value.shape[1:])
            return (moved if value.is_floating_point() else moved.round()).to(value.dtype)
        if name in self.conditions:
            rows = inputs[self.conditions[name]]
            rows = (self.factor * rows).reshape(-1, *value.shape[1:]) if name == self.weight else rows
            return rows.to(value.dtype)
        constant = getattr(self, f"constant_{number}")
        return constant.repeat(time.shape[0], *[1] * (constant.ndim - 1)) if name in self.rowed else constant


def network(captured: Captured, process: Process, guidance: float) -> Network:
    """Return the captured transformer as a Network; refuse it where it does not repeat what was recorded."""
    conditions = captured.condition_ports()
    ports = (
        Port(port_name(captured.sorted.state), "state", "float32", captured.shape),
        Port(port_name(captured.sorted.times[0]), "time", "float32", ()),
        *conditions.values(),
    )
    names = {argument: port.name for argument, port in conditions.items()}
    times = {argument: _fit_time(captured, process, argument) for argument in captured.sorted.times}
    caller = Caller(captured, ports, names, times).eval()

    def predict(run: Recording, step: int, group: Group) -> Tensor:
        state = captured.drawn(run.steps[step].sample)
        time = torch.full((len(state),), float(_plan(process, run)[step]))
        inputs = {ports[0].name: state, ports[1].name: time}
        for argument, name in names.items():
            if argument == captured.sorted.weight:
                inputs[name] = torch.full_like(time, mixing.weight_of(captured, run))
            else:
                inputs[name] = group.inputs[argument].float()
        with torch.no_grad():
            prediction: Tensor = caller(**inputs)
        return prediction

    rule = mixing.find_rule(captured, lambda group: predict(captured.runs.first, 0, group))
    for run in captured.runs.recordings:
        for number, step in enumerate(run.steps):
            predictions = [predict(run, number, group) for group in captured.groups(step)]
            error = distance(mixing.mix(captured, rule, predictions, run), captured.drawn(step.prediction))
            if not error <= CLOSE:
                what = f"step {number + 1} of {len(run.steps)} of seeds {run.seeds} is not repeated"
                raise UsageError(f"{what} by the arguments as they were sorted: relative L2 {error:.2g}: refused")
    return Network(
        caller,
        ports,
        guidance=guidance if captured.guided or captured.sorted.weight else 1.0,
        guidance_port=names.get(captured.sorted.weight, ""),
        rule=rule if captured.guided and not isinstance(rule, rules.Linear) else None,
    )


def _plan(process: Process, run: Recording) -> NDArray[np.float64]:
    return plan(process, process.sampler.solver, len(run.steps))


def _fit_time(captured: Captured, process: Process, argument: str) -> tuple[float, float]:
    """Return factor and offset by which an argument follows from the process's times."""
    pairs = [
        (time, float(captured.own(run, number).inputs[argument].flatten()[0]))
        for run in captured.runs.recordings
        for number, time in enumerate(_plan(process, run))
    ]
    times, values = (np.array(column, np.float64) for column in zip(*pairs, strict=True))
    total = process.train_steps
    for factor, offset in ((1, 0), (total, 0), (1 / total, 0), (-1, 1), (-total, total), (-1 / total, 1)):
        if np.allclose(factor * times + offset, values, rtol=EXACT, atol=EXACT * np.abs(values).max()):
            return float(factor), float(offset)
    shown = ", ".join(f"{value:g} at {time:g}" for time, value in pairs[:3])
    raise UsageError(f"{argument} is {shown}: no form of the time that is known: refused")
