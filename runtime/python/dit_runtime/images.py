"""Pictures as arrays and files: uint8 [N, H, W, 3], PNG and ADM's .npz, with the standard library alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pictures = NDArray[np.uint8]


def to_uint8(images: NDArray[Any]) -> Pictures:
    """[N, 3, H, W] in [0, 1] -> uint8 [N, H, W, 3] by round-half-even(255 x)."""
    return np.rint(np.clip(images, 0, 1).astype(np.float64) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def grid(pictures: Pictures, columns: int | None = None) -> NDArray[np.uint8]:
    """Return one picture of all: rows of `columns`, by default as near to a square as can be; (H', W', 3)."""
    count, height, width, _ = pictures.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, height, width, 3), np.uint8)
    sheet[:count] = pictures
    return sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    path.write_bytes(png(picture))


def png(picture: NDArray[np.uint8]) -> bytes:
    """Return (H, W, 3) as an 8-bit RGB PNG."""
    import struct  # here, so that importing the runtime stays quick
    import zlib

    height, width, _ = picture.shape

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    lines = np.concatenate([np.zeros((height, 1), np.uint8), picture.reshape(height, width * 3)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 6))
        + chunk(b"IEND", b"")
    )


def write_npz(path: Path, pictures: Pictures) -> None:
    """Write the form that ADM's evaluation reads: `arr_0`, uint8 [N, H, W, 3]."""
    with path.open("wb") as file:
        np.savez(file, arr_0=pictures)


def psnr(first: NDArray[Any], second: NDArray[Any], peak: float = 255.0) -> float:
    """10 log10(peak² / mean((a − b)²)) in dB; ∞ where they are equal."""
    error = np.mean(np.square(first.astype(np.float64) - second.astype(np.float64)))
    return math.inf if error == 0 else float(10 * math.log10(peak**2 / error))


def ssim(first: NDArray[Any], second: NDArray[Any], peak: float = 255.0) -> float:
    """Mean structural similarity of (H, W, C) pictures, as Wang et al. (IEEE TIP 13, 2004) define it:

    (2 μa μb + c1) (2 σab + c2) / ((μa² + μb² + c1) (σa² + σb² + c2)),  c1 = (0.01 peak)², c2 = (0.03 peak)²

    over 11 × 11 Gaussian windows of σ = 1.5 that lie within the picture; channels alike.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    mean_a, mean_b = _windows(a), _windows(b)
    var_a, var_b = _windows(a * a) - mean_a**2, _windows(b * b) - mean_b**2
    both = _windows(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((luminance * (2 * both + c2) / (var_a + var_b + c2)).mean())


def _windows(picture: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian means, (H - 10, W - 10, C): down the columns, then along the rows."""
    weights = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    for axis in (0, 1):
        length = picture.shape[axis] - 10
        picture = sum(weight * picture.take(range(place, place + length), axis) for place, weight in enumerate(weights))
    return picture
