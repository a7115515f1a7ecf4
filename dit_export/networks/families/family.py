"""The record that makes a class of diffusers a Network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers.models.attention_processor import Attention

from dit_export.networks import Network
from dit_export.networks.text import Text


@dataclass(frozen=True)
class Family:
    """State how a transformer of one class becomes a Network, and which of its configs are covered."""

    name: str  # the class in diffusers
    network: Callable[[Any, tuple[int, int], int], Network]  # transformer, (H, W) of the latents, tokens of a caption
    tokens: Mapping[str, int]  # of a caption, by the class of the pipeline; the first where there is no pipeline
    scheduler: Mapping[str, Any] | None = None  # diffusers' config, where no folder has one
    flow_spacing: str | None = None  # of the pipeline's code, where the network predicts velocities
    gains: int | None = None  # that fold, a block, and one more for each attention; None: not predicted
    text: Text | None = None  # how its pipelines encode prompts; None: conditions are embeddings
    supported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # values of config fields

    @property
    def process(self) -> str:
        """Return the kind of process that the network's predictions and times belong to: "flow" or "noise"."""
        return "noise" if self.flow_spacing is None else "flow"

    def counts(self, transformer: Any) -> dict[str, int]:
        """Return how often passes must fire, as far as that does not depend on sizes, which price the cut."""
        attentions = sum(isinstance(module, Attention) for module in transformer.modules())
        gains = {} if self.gains is None else {"fold_gains": self.gains * transformer.config.num_layers + attentions}
        return {"share_rows": 2, "guide": 1, "plain_attention": attentions} | gains

    @property
    def default_tokens(self) -> int:
        return next(iter(self.tokens.values()))
