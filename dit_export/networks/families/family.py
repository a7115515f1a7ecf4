"""What a class of diffusers needs to become a Network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dit_export.networks import Network


@dataclass(frozen=True)
class Family:
    """How a transformer of one class becomes a Network, and which of its configs are covered."""

    name: str  # the class in diffusers
    network: Callable[[Any, tuple[int, int], int], Network]  # transformer, (H, W) of the latents, tokens of a caption
    tokens: Mapping[str, int]  # of a caption, by the class of the pipeline; the first where there is no pipeline
    scheduler: Mapping[str, Any] | None = None  # diffusers' config, where no folder has one
    flow_spacing: str | None = None  # of the pipeline's code, where the network predicts velocities
    supported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # values of config fields

    @property
    def process(self) -> str:
        """Return the kind of process that the network's predictions and times belong to: "flow" or "noise"."""
        return "noise" if self.flow_spacing is None else "flow"

    @property
    def default_tokens(self) -> int:
        return next(iter(self.tokens.values()))
