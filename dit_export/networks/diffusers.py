"""Capture what a pipeline gives its transformer, and sort it into ports."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError


class Call(NamedTuple):
    """One call of a transformer: tensors by argument, and what it returned."""

    inputs: Mapping[str, Tensor]
    output: Tensor


def capture(pipeline: Any, **arguments: Any) -> tuple[Port, ...]:
    """Run a pipeline of diffusers for two steps and list its transformer's ports, named as the arguments are.

    This is where a network of one's own starts: wrap the transformer so that it takes the ports by name, and state
    them. `capture(pipeline, prompt="a cat")` takes what the pipeline takes. The values of an int64 port cannot be
    counted from outside: its `size` is 0 and must be filled in.
    """
    arguments = {"output_type": "latent"} | arguments | {"num_inference_steps": 2}
    return sort(*record(pipeline.transformer, lambda: pipeline(**arguments)))


def record(transformer: nn.Module, run: Callable[[], object]) -> list[Call]:
    """Return the calls of `transformer` while `run` runs."""
    signature, calls = inspect.signature(transformer.forward), []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        output = output if isinstance(output, Tensor) else output[0]
        inputs = dict(tensors(signature.bind(*args, **kwargs).arguments))
        calls.append(Call(inputs, output.clone()))

    hook = transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        hook.remove()
    return calls


def tensors(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested arguments by dotted name."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield prefix + name, value.clone()
        elif isinstance(value, Mapping):
            yield from tensors(value, f"{prefix}{name}.")


def sort(*calls: Call) -> tuple[Port, ...]:
    """Sort arguments by comparing two steps: state, then time, then conditions.

    A tensor that moved is the state where it has the output's shape but for channels, and the time where it is a number
    a row. What is equal in both calls is a condition, or a constant of the network where it has no rows.
    """
    if len(calls) != 2:
        raise UsageError(f"the transformer was called {len(calls)} times in two steps; expected once a step")
    first, second = calls
    rows, _, *spatial = first.output.shape
    ports: dict[str, list[Port]] = {"state": [], "time": [], "condition": []}
    for name, value in first.inputs.items():
        shape = tuple(value.shape[1:])
        if value.shape == second.inputs[name].shape and torch.equal(value, second.inputs[name]):
            if value.shape[:1] == (rows,):
                dtype = "float32" if value.is_floating_point() else "int64"
                ports["condition"].append(Port(name, "condition", dtype, shape))
        elif list(shape[1:]) == spatial and len(value) == rows:
            ports["state"].append(Port(name, "state", "float32", shape))
        elif value.ndim == 0 or (value.ndim == 1 and len(value) in (1, rows)):
            ports["time"].append(Port(name, "time", "float32", ()))
        else:
            raise UsageError(f"{name} of shape {list(value.shape)} changes from step to step and is no state: refused")
    for role in ("state", "time"):
        if len(ports[role]) != 1:
            names = ", ".join(port.name for port in ports[role]) or "no argument"
            raise UsageError(f"{names}: expected one argument of the transformer with the role {role!r}")
    conditions = [_mask(port, first.inputs[port.name], ports["condition"]) for port in ports["condition"]]
    return (*ports["state"], *ports["time"], *conditions)


def _mask(port: Port, value: Tensor, conditions: list[Port]) -> Port:
    """Return the port as a mask where its values are 0 and 1, and another one has as many tokens."""
    if value.ndim != 2 or not ((value == 0) | (value == 1)).all():
        return port
    masked = [other.name for other in conditions if len(other.shape) > 1 and other.shape[0] == value.shape[1]]
    return Port(port.name, "condition", "float32", port.shape, masks=masked[0]) if len(masked) == 1 else port
