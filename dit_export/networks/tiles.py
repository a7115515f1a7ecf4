"""Tiles of a large picture, decoded or encoded one after the other and blended over their seams, as diffusers does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_runtime.errors import UsageError


class Tiles(NamedTuple):
    """Sides in what is read and in what is made; an overlap is blended linearly."""

    side: int  # of a tile that is read
    step: int  # from one to the next
    overlap: int  # in what is made
    kept: int  # of each tile that is made, but for the last

    def __call__(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return what `compute` makes of x, (B, C, H, W), tile by tile; at once where x is no larger than one."""
        height, width = x.shape[-2:]
        if max(height, width) <= self.side:
            return compute(x)
        rows: list[list[Tensor]] = []
        for top in range(0, height, self.step):
            row: list[Tensor] = []
            for left in range(0, width, self.step):
                tile = compute(x[:, :, top : top + self.side, left : left + self.side])
                if rows:
                    tile = _blend(rows[-1][len(row)], tile, self.overlap, -2)
                if row:
                    tile = _blend(row[-1], tile, self.overlap, -1)
                row.append(tile)
            rows.append(row)
        strips = [torch.cat([tile[:, :, : self.kept, : self.kept] for tile in row], -1) for row in rows]
        return torch.cat(strips, -2)


def _blend(before: Tensor, tile: Tensor, overlap: int, axis: int) -> Tensor:
    """Return the tile whose first lines go over from the last ones of the tile before it."""
    overlap = min(before.shape[axis], tile.shape[axis], overlap)
    weights = torch.arange(overlap, dtype=tile.dtype) / overlap
    weights = weights[:, None] if axis == -2 else weights
    last = before.narrow(axis, before.shape[axis] - overlap, overlap)
    first = tile.narrow(axis, 0, overlap)
    rest = tile.narrow(axis, overlap, tile.shape[axis] - overlap)
    return torch.cat([last * (1 - weights) + first * weights, rest], axis)


def enable(vae: Any, side: int) -> None:
    """Make a VAE work on tiles of `side` pixels, with diffusers' own switch."""
    if type(vae).__name__ != "AutoencoderKL":
        raise UsageError(f"tile {side}: {type(vae).__name__} has no tiles here; AutoencoderKL has")
    cell = 2 ** (len(vae.config.block_out_channels) - 1)
    if side < 4 * cell or side % (4 * cell):
        raise UsageError(f"tile {side}; expected a multiple of {4 * cell}, of whose cells a quarter overlaps")
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // cell


def of_decoder(vae: Any) -> Tiles | None:
    return _tiles(vae, vae.tile_latent_min_size, vae.tile_sample_min_size) if vae.use_tiling else None


def of_encoder(vae: Any) -> Tiles | None:
    return _tiles(vae, vae.tile_sample_min_size, vae.tile_latent_min_size) if vae.use_tiling else None


def _tiles(vae: Any, read: int, made: int) -> Tiles:
    overlap = int(made * vae.tile_overlap_factor)
    return Tiles(read, int(read * (1 - vae.tile_overlap_factor)), overlap, made - overlap)
