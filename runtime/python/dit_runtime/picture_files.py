"""Pictures from files: PNG, JPEG and WebP through Pillow (extra `[images]`), checked before they are decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import UsageError
from dit_runtime.facts import LIMITS

FORMATS = ("PNG", "JPEG", "WEBP")
Source = Path | bytes  # a file, or what is in one


def read_picture(source: Source, height: int, width: int, name: str = "", smooth: str = "lanczos") -> NDArray[np.uint8]:
    """Return the picture of a file, stretched to this size with Pillow's filter `smooth`; [height, width, 3].

    It is turned as its EXIF data say; CMYK becomes RGB, 16 bits become their upper 8, and alpha is left out.
    """
    return _read(source, name, lambda image: _resized(_opaque(image).convert("RGB"), height, width, smooth))


def read_mask(source: Source, height: int, width: int, name: str = "") -> NDArray[np.uint8]:
    """Return the mask of a file, stretched to this size; [height, width], white where it is drawn anew.

    That is where the file is transparent, if it is anywhere; else where it is white.
    """

    def values(image: Any) -> NDArray[np.uint8]:
        if "A" in image.getbands() or "transparency" in image.info:
            alpha = image.convert("RGBA").getchannel("A")
            if alpha.getextrema()[0] < 255:
                return 255 - _resized(alpha, height, width)
        return _resized(_opaque(image).convert("L"), height, width)

    return _read(source, name, values)


def fit(pictures: NDArray[np.uint8], height: int, width: int, smooth: str = "lanczos") -> NDArray[np.uint8]:
    """Stretch pictures [N, H, W, 3] to a size, with Pillow's filter of this name."""
    image = _pillow()
    return np.stack([_resized(image.fromarray(picture), height, width, smooth) for picture in pictures])


def _read(source: Source, name: str, values: Callable[[Any], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return what is made of a file's decoded picture; refuse a file that is damaged, animated or too large."""
    image_module = _pillow()
    from PIL import ImageOps

    where = name or (str(source) if isinstance(source, Path) else "image")
    if isinstance(source, Path) and not source.is_file():
        raise UsageError(f"{where}: no such file")
    content = source.read_bytes() if isinstance(source, Path) else source
    try:
        with closing(image_module.open(io.BytesIO(content), formats=FORMATS)) as image:
            width, height = image.size
            if width * height > LIMITS["pixels"]:
                raise UsageError(f"{where}: {width} x {height} pixels; expected at most {LIMITS['pixels']} in all")
            if image.format != "MPO" and getattr(image, "n_frames", 1) != 1:  # a camera's JPEG: the others are previews
                raise UsageError(f"{where}: an animation of {image.n_frames} frames; expected one picture")
            image.load()
            return values(ImageOps.exif_transpose(image))
    except UsageError:
        raise
    except image_module.UnidentifiedImageError:
        raise UsageError(f"{where}: not a picture in {', '.join(FORMATS)}") from None
    except Exception as error:  # what a damaged file raises shares no base class but this
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{where}: cannot be read as a picture: {reason}") from None


def _opaque(image: Any) -> Any:
    """Return an image that Pillow converts as it should: it clips 16 bits to 8, and warns of a palette with alpha."""
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    if not image.mode.startswith("I"):
        return image
    return _pillow().fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


def _resized(image: Any, height: int, width: int, smooth: str = "lanczos") -> NDArray[np.uint8]:
    """Return an image in a size as diffusers' pipelines make it: the whole of it, whatever its proportions."""
    return np.asarray(image.resize((width, height), _pillow().Resampling[smooth.upper()]))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UsageError("reading pictures needs Pillow: pip install 'dit-runtime[images]'") from None
    # Of sizes beyond the limit above, which are refused in one line.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return Image
