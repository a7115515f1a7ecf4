"""Patches and three-axis rotary positions, for transformers whose own forward cuts each prompt to its length.

Those lengths are numbers in Python there, which no graph can read. Here every prompt has all tokens of the port; masks
leave out what a prompt does not have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dit_runtime.errors import UsageError


def pack(latents: Tensor, patch: int) -> Tensor:
    """Return the tokens of latents, row by row: (B, C, H, W) to (B, tokens, patch² C), channels last in a token."""
    cells = latents.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, h, p, w, p)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """Return the latents of tokens: the inverse of `pack`."""
    height, width = (side // patch for side in size)
    cells = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))  # (B, h, w, p, p, C)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Positions(nn.Module):
    """Return rotary factors, complex as [..., 2]: of text at (place, 0, 0), of an image at (start, row, column)."""

    starts: Tensor
    text: Tensor
    image: Tensor

    def __init__(self, tables: Sequence[Tensor], places: Tensor, grid: tuple[int, int]) -> None:
        super().__init__()
        starts, rows, columns = (torch.view_as_real(table.to(torch.complex64)) for table in tables)
        (height, width), last = grid, int(places[-1]) + 1
        if last >= len(starts):
            most = len(places) - (last - len(starts)) - 1
            raise UsageError(f"captions of {len(places)} tokens; the position table has room for {most}")
        if height > len(rows) or width > len(columns):
            sides = f"{len(rows)} x {len(columns)}"
            raise UsageError(f"an image of {height} x {width} tokens; the position tables have room for {sides}")
        row, column = torch.cartesian_prod(torch.arange(height), torch.arange(width)).unbind(1)
        still = torch.cat([rows[:1], columns[:1]], dim=1).expand(len(places), -1, -1)
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer("text", torch.cat([starts[places], still], dim=1), persistent=False)
        self.register_buffer("image", torch.cat([rows[row], columns[column]], dim=1), persistent=False)

    def forward(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """`start` (B,) is the first coordinate of each row's image; give (B, tokens, D / 2, 2) of text and of image."""
        starts = self.starts[start][:, None].expand(-1, self.image.shape[0], -1, -1)
        image = self.image.expand(start.shape[0], -1, -1, -1)
        return self.text.expand(start.shape[0], -1, -1, -1), torch.cat([starts, image], dim=2)
