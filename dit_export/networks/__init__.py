"""Networks that predict: a PyTorch module and its ports, whoever wrote the module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dit_export.recipe import PIXELS
from dit_runtime.bundle.checks import check_network
from dit_runtime.bundle.records import PACKS, Port, WithPorts
from dit_runtime.errors import UsageError
from dit_runtime.facts import DEFAULT_GUIDANCE

if TYPE_CHECKING:  # the command line imports this package and must not wait for PyTorch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Network(WithPorts):
    """A module that predicts, called as `module(**{port.name: rows})`: (rows, C, …), or (rows, 2 C, …) with a variance.

    The module is in eval mode, float32 and without gradients.
    """

    module: nn.Module
    ports: tuple[Port, ...]
    null: Mapping[str, int | float] = field(default_factory=dict)
    guided_channels: int | None = None  # leading channels that guidance moves; None: all
    unguided_up_to_one: bool = True  # guidance <= 1 (not only == 1) runs without the null rows
    guidance: float = DEFAULT_GUIDANCE  # the weight of a request that names none
    guidance_port: str = ""  # the condition port that takes the weight, in a network that is guided by itself
    rule: nn.Module | None = None  # see `rules`; None: linear
    learned_variance: bool = False
    pixels: int = PIXELS  # image pixels along a cell of the state
    model: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)  # how often each pass must fire; {}: nothing is predicted
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # by name, of a module that streams them; {}: its own

    def __post_init__(self) -> None:
        names = [port.name for port in self.ports]
        if len(set(names)) != len(names):
            raise UsageError(f"ports {', '.join(names)}: expected distinct names")
        for name in names:
            if re.fullmatch(rf"({'|'.join(PACKS.values())})(_\d+)?", name):
                raise UsageError(f"a port is called {name!r}, as a tensor of a bundle's stages; give it another name")
        if self.rule is not None and not self.mixes_guidance:
            raise UsageError("got a rule of guidance for a network without conditions, or one that is guided by itself")
        try:
            check_network(self.ports, self.null, self.guided_channels, self.guidance_port)
        except ValueError as error:
            raise UsageError(str(error)) from None

    @property
    def mixes_guidance(self) -> bool:
        """Tell whether guidance mixes two predictions, one for the condition and one for the negative."""
        return bool(self.conditions) and not self.guidance_port
