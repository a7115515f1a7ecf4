"""Modules without weights of their own: each part reads its parameters when it runs, and drops them afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def stream(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace the parameters by fakes, which have a shape and a type, and read `weights` by name where a part runs.

    So a module of any size is traced and run in the memory of its largest part. A part that reads the parameters of
    another one gets fakes, and its result has no values.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    for path, part in module.named_modules():
        names = {key: f"{path}.{key}".lstrip(".") for key, value in part._parameters.items() if value is not None}
        if names:
            for key in names:
                part._parameters[key] = _frozen(fakes.from_tensor(part._parameters[key]))
            _Streamed(part, names, weights)


class _Streamed:
    """Read a part's own parameters before each run of it, but for a trace."""

    def __init__(self, part: nn.Module, names: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
        self._fakes = {key: part._parameters[key] for key in names}
        self._names, self._weights = names, weights
        part.register_forward_pre_hook(self._read)
        part.register_forward_hook(self._drop, always_call=True)

    def _read(self, part: nn.Module, _: Any) -> None:
        if not torch.compiler.is_exporting():
            part._parameters.update({key: _frozen(self._weights[name].float()) for key, name in self._names.items()})

    def _drop(self, part: nn.Module, *_: Any) -> None:
        part._parameters.update(self._fakes)


def _frozen(value: Any) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
