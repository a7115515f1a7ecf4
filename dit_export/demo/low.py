"""Low-resolution pictures: 16 pixels of the data set's 64, enlarged again, and the latents that a DiT reads of them."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from dit_export.demo import data, losses
from dit_runtime.picture_files import fit

FACTOR = 4
CHUNK = 250

Pictures = NDArray[np.uint8]


def shrink(images: Pictures) -> Pictures:
    """Take the mean of each 4 × 4 pixels; (N, H, W, 3) -> (N, H / 4, W / 4, 3)."""
    count, height, width, channels = images.shape
    cells = images.reshape(count, height // FACTOR, FACTOR, width // FACTOR, FACTOR, channels)
    return np.rint(cells.mean((2, 4))).astype(np.uint8)


def enlarge(small: Pictures) -> Pictures:
    """Return pictures of 4 times the sides, as `dit-run sample --image` reads small ones."""
    return fit(small, small.shape[1] * FACTOR, small.shape[2] * FACTOR, "bicubic")


def condition(vae: AutoencoderKL, small: Pictures) -> Tensor:
    """Return the port's rows: the mean latents of the enlarged pictures, scaled; (N, C, h, w)."""
    rows = []
    for start in range(0, len(small), CHUNK):
        large = enlarge(small[start : start + CHUNK])
        moments = losses.encode(vae, data.Samples(large, np.zeros(len(large), np.int64)))
        rows.append(moments.chunk(2, dim=1)[0] * vae.config.scaling_factor)
    return torch.cat(rows)
