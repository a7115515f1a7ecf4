"""Networks that predict: a PyTorch module and its ports, whoever wrote the module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError

if TYPE_CHECKING:  # the command line imports this package and must not wait for PyTorch
    from torch import nn


@dataclass(frozen=True)
class Network:
    """A module that predicts, called as `module(**{port.name: rows})`: (rows, C, …), or (rows, 2 C, …) with a variance.

    The module is in eval mode, float32 and without gradients.
    """

    module: nn.Module
    ports: tuple[Port, ...]
    null: Mapping[str, int | float] = field(default_factory=dict)
    guided_channels: int | None = None  # leading channels that guidance moves; None: all
    unguided_up_to_one: bool = True  # guidance <= 1 (not only == 1) runs without the null rows
    learned_variance: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)  # how often each pass must fire; {}: nothing is predicted

    def __post_init__(self) -> None:
        names = [port.name for port in self.ports]
        if len(set(names)) != len(names):
            raise UsageError(f"ports {', '.join(names)}: expected distinct names")
        for role in ("state", "time"):
            if sum(port.role == role for port in self.ports) != 1:
                raise UsageError(f"ports {', '.join(names)}: expected exactly one with the role {role!r}")
        conditions = {port.name for port in self.conditions}
        for port in self.ports:
            if port.masks and not (port in self.conditions and port.masks in conditions - {port.name}):
                raise UsageError(f"port {port.name} masks {port.masks!r}; both must be condition ports")
        if unknown := sorted(self.null.keys() - conditions):
            raise UsageError(f"null has {unknown[0]!r}; expected condition ports: {', '.join(sorted(conditions))}")

    @property
    def state(self) -> Port:
        return next(port for port in self.ports if port.role == "state")

    @property
    def time(self) -> Port:
        return next(port for port in self.ports if port.role == "time")

    @property
    def conditions(self) -> tuple[Port, ...]:
        return tuple(port for port in self.ports if port.role == "condition")
