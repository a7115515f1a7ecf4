"""Pictures as arrays and files: uint8 [N, H, W, 3], videos [N, F, H, W, 3]; PNG and ADM's .npz need NumPy alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import UsageError
from dit_runtime.files import beside, write_file

Pictures = NDArray[np.uint8]


def to_uint8(images: NDArray[Any]) -> Pictures:
    """[N, 3, H, W] or [N, 3, F, H, W] in [0, 1] -> uint8 with channels last, by round-half-even(255 x)."""
    return np.moveaxis(np.rint(np.clip(images, 0, 1).astype(np.float64) * 255).astype(np.uint8), 1, -1)


def to_unit(pictures: Pictures) -> NDArray[np.float32]:
    """Return the inverse of `to_uint8`: uint8 with channels last -> float32 [N, 3, …] in [0, 1]."""
    return np.moveaxis(pictures, -1, 1).astype(np.float32) / np.float32(255)


def grid(pictures: Pictures, columns: int | None = None) -> NDArray[np.uint8]:
    """Return one picture of all, (H', W', 3): rows of `columns`, by default as near to a square as can be.

    Of videos it has a row each, of all frames.
    """
    if pictures.ndim == 5:
        columns, pictures = pictures.shape[1], pictures.reshape(-1, *pictures.shape[2:])
    count, height, width, _ = pictures.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, height, width, 3), np.uint8)
    sheet[:count] = pictures
    return sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def still(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture (H, W, 3) as it is, and a video (F, H, W, 3) as a grid of its frames."""
    return grid(picture) if picture.ndim == 4 else picture


class Picture:
    """A picture that notebooks show; `show` makes it of any number of them."""

    def __init__(self, pixels: NDArray[np.uint8], what: str) -> None:
        self.pixels, self._what = pixels, what

    def __repr__(self) -> str:
        return f"<{self._what}>"

    def _repr_png_(self) -> bytes:
        return png(self.pixels)


def show(pictures: Pictures, columns: int | None = None) -> Picture:
    """Return what a notebook shows of pictures [N, H, W, 3], of one [H, W, 3], or of videos [N, F, H, W, 3]: a grid."""
    array = np.asarray(pictures)
    if array.dtype != np.uint8 or array.ndim not in (3, 4, 5) or array.shape[-1] != 3 or not array.size:
        raise UsageError(f"got {array.dtype} {[*array.shape]}; expected uint8 pictures, with 3 channels last")
    array = array[None] if array.ndim == 3 else array
    height, width = array.shape[-3:-1]
    kind = "picture" if array.ndim == 4 else "video"
    what = f"{len(array)} {kind}{'s' if len(array) > 1 else ''} of {height} x {width} pixels"
    return Picture(grid(array, columns), what)


def write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    write_file(path, png(picture))


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
    with beside(path) as partial, partial.open("wb") as file:
        np.savez(file, arr_0=pictures)


def write_npy(path: Path, latents: NDArray[Any]) -> None:
    with beside(path) as partial, partial.open("wb") as file:
        np.save(file, latents)


def write_folder(path: Path, pictures: Pictures) -> None:
    """Write a PNG for each picture, 0.png …, or for each frame of each video, 0-0.png …, with zeros before a number."""
    path.mkdir(exist_ok=True)
    widths = [len(str(count - 1)) for count in pictures.shape[:-3]]
    for index in np.ndindex(*pictures.shape[:-3]):
        name = "-".join(f"{number:0{width}}" for number, width in zip(index, widths, strict=True))
        write_png(path / f"{name}.png", pictures[index])


def require_mp4(path: Path, rate: int) -> None:
    """Refuse what `write_mp4` could not write, before there are videos."""
    if rate < 1:
        raise UsageError(f"{path}: {rate} frames a second; expected 1 or more")
    try:
        import av  # noqa: F401
    except ImportError:
        raise UsageError(f"{path}: needs PyAV: pip install 'dit-runtime[video]', or pass -o FOLDER for PNGs") from None


def write_mp4(path: Path, videos: Pictures, rate: int) -> None:
    """Write videos [N, F, H, W, 3] as one of `rate` frames a second, with H.264 in 4:2:0; several are a grid."""
    require_mp4(path, rate)
    import av

    with beside(path) as partial, av.open(str(partial), "w", format="mp4") as file:
        sheets = [grid(frames) for frames in videos.swapaxes(0, 1)]
        height, width, _ = sheets[0].shape
        stream = file.add_stream("libx264", rate=rate, width=width, height=height, pix_fmt="yuv420p")
        for sheet in sheets:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(sheet, format="rgb24")))
        file.mux(stream.encode())


def psnr(first: NDArray[Any], second: NDArray[Any], peak: float = 255.0) -> float:
    """10 log10(peak² / mean((a − b)²)) in dB; ∞ where they are equal."""
    error = np.mean(np.square(first.astype(np.float64) - second.astype(np.float64)))
    return math.inf if error == 0 else float(10 * math.log10(peak**2 / error))


def ssim(first: NDArray[Any], second: NDArray[Any], peak: float = 255.0) -> float:
    """Mean structural similarity of pictures (H, W, C) or videos (F, H, W, C), by Wang et al. (IEEE TIP 13, 2004):

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
    """Gaussian means, (…, H - 10, W - 10, C): down the columns, then along the rows."""
    weights = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    for axis in (-3, -2):
        length = picture.shape[axis] - 10
        picture = sum(weight * picture.take(range(place, place + length), axis) for place, weight in enumerate(weights))
    return picture
