"""Pictures that a request brings as arrays: their checks, and the forms that the encoder and the state take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime import images
from dit_runtime.conditions.condition import as_array
from dit_runtime.errors import UsageError


def as_pictures(values: Any, height: int, width: int) -> NDArray[np.float32]:
    """Return pictures [N, 3, height, width] in [0, 1] of one or N of them with channels last."""
    array = _in_size(values, "image", (height, width, 3))
    if array.dtype == np.uint8:
        return images.to_unit(array)
    pictures = np.moveaxis(array, -1, 1).astype(np.float32)
    if array.dtype.kind != "f" or not (pictures.min() >= 0 and pictures.max() <= 1):  # NaN is neither
        raise UsageError(f"image holds {array.dtype}; expected uint8, or floats from 0 to 1")
    return pictures


def as_mask(values: Any, height: int, width: int, state: Sequence[int]) -> NDArray[np.float32]:
    """Return a mask [N, 1, h, w] of the state's cells, 1 where its first pixel is white: at least half of the way."""
    array = _in_size(values, "mask", (height, width))
    if array.dtype != np.uint8 and not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
        raise UsageError(f"mask holds {array.dtype} that are not from 0 to 1; expected those, or uint8")
    half = 128 if array.dtype == np.uint8 else 0.5
    cells = array[:, :: height // state[1], :: width // state[2]]
    return (cells >= half).astype(np.float32)[:, None]


def _in_size(values: Any, what: str, shape: tuple[int, ...]) -> NDArray[Any]:
    array = as_array(values, what)
    several = array if array.ndim > len(shape) else array[None]
    if several.shape[1:] != shape or not len(several):
        expected = f"{[*shape]}, or one for each sample (dit_runtime.picture_files.fit)"
        raise UsageError(f"{what} has shape {[*array.shape]}; expected {expected}")
    return several
