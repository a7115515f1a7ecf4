"""Text encoders that several families read in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class SecondLastLayer(nn.Module):
    """Return the hidden states before a language model's last layer, and the mask of a prompt's tokens."""

    def __init__(self, encoders: Mapping[str, Any], transformer: Any, tokens: int) -> None:
        super().__init__()
        self.language = encoders["text_encoder"]

    def forward(self, ids: Tensor, ids_mask: Tensor) -> tuple[Tensor, Tensor]:
        output = self.language(ids, attention_mask=ids_mask, output_hidden_states=True, use_cache=False)
        return output.hidden_states[-2], ids_mask.float()
