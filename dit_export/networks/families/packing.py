"""Latents as tokens of 2 x 2 cells, as pipelines of the Flux kind pack them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 2  # cells of the latents along a token


def pack(latents: Tensor) -> Tensor:
    """Return the tokens of latents, row by row: (B, C, H, W) to (B, H·W / 4, 4 C), channels first in a token."""
    return F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the latents of tokens: the inverse of `pack`."""
    grid = size[0] // PATCH, size[1] // PATCH
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), PATCH)


def positions(size: tuple[int, int]) -> Tensor:
    """Return (0, row, column) of each token of an image, as numbers of float32; text stands at (0, 0, 0)."""
    rows, columns = (torch.arange(side // PATCH, dtype=torch.float32) for side in size)
    return torch.cartesian_prod(torch.zeros(1), rows, columns)
