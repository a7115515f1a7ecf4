"""Modules without weights of their own: each part reads its parameters when it runs, and drops them afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def stream(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace the parameters of parts without parts by fakes, and read their `weights` by name where they run.

    A fake has a shape and a type. So a module of any size is traced and run in the memory of its largest part. The few
    tables of larger parts are read at once. A part that reads a fake of another one gives a result without values.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    for path, part in module.named_modules():
        names = {key: f"{path}.{key}".lstrip(".") for key in part._parameters}
        names = {key: name for key, name in names.items() if name in weights}
        if names and not any(part.children()):
            part._parameters.update({key: _frozen(fakes.from_tensor(part._parameters[key])) for key in names})
            _Streamed(part, names, weights)
        else:
            part._parameters.update({key: _read(weights, name) for key, name in names.items()})


class _Streamed:
    """Read a part's own parameters before each run of it, but for a trace."""

    def __init__(self, part: nn.Module, names: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
        self._fakes = {key: part._parameters[key] for key in names}
        self._names, self._weights = names, weights
        part.register_forward_pre_hook(self._read)
        part.register_forward_hook(self._drop, always_call=True)

    def _read(self, part: nn.Module, _: Any) -> None:
        if not torch.compiler.is_exporting():
            part._parameters.update({key: _read(self._weights, name) for key, name in self._names.items()})

    def _drop(self, part: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_exporting():  # a part that runs twice must find the trace's own parameters again
            part._parameters.update(self._fakes)


def _read(weights: Mapping[str, Tensor], name: str) -> nn.Parameter:
    return _frozen(weights[name].float().contiguous())


def _frozen(value: Any) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
