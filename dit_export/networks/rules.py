"""Rules of guidance: modules (conditional, negative, weight) -> guided.

All have the shape (B, C, …) of the guided channels, the weight (B, 1, …). A weight of 1, or a negative that is equal
to the conditional prediction, must return the latter bit for bit.
"""

from __future__ import annotations

from torch import Tensor, nn

from dit_export.networks import Network

LEAST = 1e-30  # a token of zeros stays one


class Linear(nn.Module):
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): conditional + (w - 1) (conditional - negative)."""

    def forward(self, conditional: Tensor, negative: Tensor, weight: Tensor) -> Tensor:
        return conditional + (weight - 1) * (conditional - negative)


class Renormalized(Linear):
    """Linear guidance after which each token has the norm of its conditional prediction again, as Qwen-Image has it.

    A token is a patch of all channels, of so many positions along each axis of the state after them.
    """

    def __init__(self, *patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, conditional: Tensor, negative: Tensor, weight: Tensor) -> Tensor:
        guided = super().forward(conditional, negative, weight)
        own, new = self._tokens(conditional), self._tokens(guided)
        return (new * (_norm(own) / _norm(new).clamp_min(LEAST))).reshape(guided.shape)

    def _tokens(self, values: Tensor) -> Tensor:
        """Return (B, C, patches, positions, patches, positions, …)."""
        for axis, size in reversed([*enumerate(self.patch, 2)]):
            values = values.unflatten(axis, (-1, size))
        return values


def _norm(tokens: Tensor) -> Tensor:
    return tokens.square().sum(dim=(1, *range(3, tokens.ndim, 2)), keepdim=True).sqrt()


def rule(network: Network) -> nn.Module:
    """Return the network's rule in eval mode."""
    return (network.rule or Linear()).eval()
