"""Record what a pipeline of diffusers gives its transformer and its scheduler."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dit_runtime.errors import UsageError


class Call(NamedTuple):
    """One call of a transformer: the leaves of its arguments by dotted name, how they nest, and its first result."""

    inputs: Mapping[str, Any]
    nesting: pytree.TreeSpec
    output: Any


class Step(NamedTuple):
    """One step of the scheduler: the calls before it, and the prediction and the state that it was given."""

    calls: tuple[Call, ...]
    prediction: Tensor
    sample: Tensor


class Recording(NamedTuple):
    """One run of a pipeline."""

    seeds: tuple[int, ...]
    steps: tuple[Step, ...]
    final: Tensor  # the state after the last step
    draws: tuple[Tensor, ...]  # of torch.randn, in order
    schedule: Mapping[str, Any]  # what the pipeline passed to the scheduler's set_timesteps
    result: Any  # the first of the pipeline's


def record(pipeline: Any, seeds: Sequence[int], **arguments: Any) -> Recording:
    """Run a pipeline with a generator for each sample, and return what passed through it."""
    steps: list[Step] = []
    schedule: dict[str, Any] = {}
    final: Tensor | None = None
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scheduler = pipeline.scheduler
    with _recorded_calls(pipeline.transformer) as calls, _Draws() as draws, torch.no_grad():

        def note_step(bound: Mapping[str, Any], output: Any) -> None:
            nonlocal final
            final = output[0].clone()
            steps.append(Step(tuple(calls), bound["model_output"].clone(), bound["sample"].clone()))
            calls.clear()

        def note_schedule(bound: Mapping[str, Any], _: Any) -> None:
            schedule.update(bound)

        with _watched(scheduler, "step", note_step), _watched(scheduler, "set_timesteps", note_schedule):
            result = pipeline(generator=generators if len(seeds) > 1 else generators[0], **arguments)
    if final is None:
        raise UsageError(f"{type(scheduler).__name__}: its step was not called; expected once a step")
    return Recording(tuple(seeds), tuple(steps), final, tuple(draws.values), schedule, result[0])


@contextmanager
def _recorded_calls(transformer: nn.Module) -> Iterator[list[Call]]:
    signature, calls = inspect.signature(transformer.forward), []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        output = output if isinstance(output, Tensor) else output[0]
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        leaves, nesting = pytree.tree_flatten_with_path(arguments)
        inputs = {".".join(_word(key) for key in path): _copy(value) for path, value in leaves}
        calls.append(Call(inputs, nesting, _copy(output)))

    hook = transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _word(key: Any) -> str:
    return str(key.idx if isinstance(key, pytree.SequenceKey) else key.key)


@contextmanager
def _watched(owner: Any, name: str, note: Callable[[Mapping[str, Any], Any], None]) -> Iterator[None]:
    """Pass a method's arguments and results to `note` while the body runs."""
    method = getattr(owner, name)
    signature = inspect.signature(method)

    @functools.wraps(method)
    def watch(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        bound = {key: _copy(value) for key, value in bound.items()}
        output = method(*args, **kwargs)
        note(bound, output)
        return output

    setattr(owner, name, watch)
    try:
        yield
    finally:
        delattr(owner, name)


class _Draws(TorchFunctionMode):
    """Keep what torch.randn returns."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.randn:
            self.values.append(output.clone())
        return output
