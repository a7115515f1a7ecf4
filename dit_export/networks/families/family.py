"""The record that makes a class of diffusers a Network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention

from dit_export.networks import Network
from dit_export.networks.text import Text
from dit_export.recipe import PIXELS
from dit_runtime.facts import DEFAULT_STEPS


@dataclass(frozen=True)
class Family:
    """State how a transformer of one class becomes a Network, and which of its configs are covered."""

    name: str  # the class in diffusers
    network: Callable[[Any, Any, int], Network]  # transformer, size of the latents (`size`), tokens of a caption
    tokens: Mapping[str, int]  # of a caption, by the class of the pipeline; the first where there is no pipeline
    # diffusers' config of a scheduler, by the transformer's, where no folder has one
    scheduler: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] = lambda config: None
    pixels: int = PIXELS  # image pixels along a cell of the state
    flow_spacing: str | None = None  # of the pipeline's code, where the network predicts velocities
    # The pipeline's own μ; see `read_scheduler_config`.
    mu: Callable[[int, Mapping[str, float]], tuple[float, float]] | None = None
    steps: Callable[[Mapping[str, Any]], int] = lambda config: DEFAULT_STEPS  # of the pipeline's runs, by the config
    size: int | None = None  # side of the latents that the pipeline takes, where that is not the config's sample_size
    video: tuple[int, int, int] | None = None  # (F, H, W) of the latents that a video pipeline takes
    frames: int = 0  # of a video along a cell of the latents; the first cell has one
    patch: int | None = None  # cells of the latents along a token, where that is not the config's patch_size
    ahead: tuple[str, ...] = ()  # submodules that read no latents, so that their layers leave the loop
    shift_tokens: Callable[[Network], int] | None = None  # what a dynamic shift counts; None: the image's tokens
    # Whether a network is made to run without guidance, by the configs of its pipeline and its scheduler ({}: none).
    distilled: Callable[[Mapping[str, Any], Mapping[str, Any]], bool] = lambda pipeline, scheduler: False
    shared: int = 2  # tensors of the state alone that conditions meet: both groups of guidance share them
    gains: int | None = None  # that fold, a block, and one more for each attention; None: not predicted
    linear_attention: tuple[type, ...] = ()  # processors of attentions without a softmax
    text: Text | None = None  # how its pipelines encode prompts; None: conditions are embeddings
    supported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # values of config fields

    @property
    def process(self) -> str:
        """Return the kind of process that the network's predictions and times belong to: "flow" or "noise"."""
        return "noise" if self.flow_spacing is None else "flow"

    def counts(self, transformer: Any, network: Network) -> dict[str, int]:
        """Return how often passes must fire, as far as that does not depend on sizes, which price the cut."""
        attentions = sum(
            isinstance(module, Attention | AttentionModuleMixin)
            and not isinstance(module.processor, self.linear_attention)
            and not name.startswith(self.ahead)
            for name, module in transformer.named_modules()
        )
        gains = {} if self.gains is None else {"fold_gains": self.gains * transformer.config.num_layers + attentions}
        return {"share_rows": self.shared, "guide": int(network.mixes_guidance), "plain_attention": attentions} | gains

    @property
    def default_tokens(self) -> int:
        return next(iter(self.tokens.values()))
