"""The demo's data set: a coloured shape on a muted background, drawn in NumPy; sample i of seed s never changes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

SIDE = 64
SHAPES = {  # over the points' radius: of the corners between them (a polygon has cos(pi / points)), of the hole; size
    "circle": (60, np.cos(np.pi / 60), 0.0, 0.86),
    "ring": (60, np.cos(np.pi / 60), 0.5, 0.95),
    "diamond": (2, 0.5, 0.0, 1.2),
    "star": (5, 0.42, 0.0, 1.2),
}
COLOURS = {
    "red": (222, 44, 44),
    "yellow": (244, 208, 40),
    "green": (44, 176, 70),
    "blue": (48, 92, 226),
    "white": (244, 244, 244),
}
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
TRAIN, VALIDATION, HELD_OUT = 0, 1, 2  # seeds: to learn from, to compare with, to score against

_OUTLINES = np.array(list(SHAPES.values()), np.float32)
_COLOURS = np.array(list(COLOURS.values()), np.float32)
_AXIS = np.arange(SIDE, dtype=np.float32) + 0.5
_DRAWS = 48  # random numbers a sample: 16 for the parameters, the rest for the cloud's grid
_CLOUD = 4


class Samples(NamedTuple):
    images: NDArray[np.uint8]  # (N, 64, 64, 3)
    labels: NDArray[np.int64]  # (N,)


def uniforms(seed: int, indices: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """(N, count) numbers in [0, 1), each a hash (SplitMix64) of its seed, index and column alone."""
    z = (indices[:, None] * count + np.arange(1, count + 1)).astype(np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed * 0xD1342543DE82EF95 % (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


def batch(seed: int, indices: ArrayLike) -> Samples:
    """Samples by index; sample i belongs to class i mod 20, so any 20 in a row are balanced."""
    indices = np.asarray(indices, np.int64)
    labels = indices % len(CLASSES)
    u = uniforms(seed, indices, _DRAWS)
    radius, cover = _shape(labels % len(SHAPES), u[:, :4])
    paint = _COLOURS[labels // len(SHAPES)] + (u[:, 4:7] - 0.5) * 24
    shade = 1 + 0.10 * (u[:, 7, None, None] - 0.5) * radius  # the shape is a little lighter to one end
    front = paint[:, None, None, :] * shade[..., None]
    picture = front * cover[..., None] + _background(u[:, 8:]) * (1 - cover[..., None])
    return Samples(np.rint(np.clip(picture, 0, 255)).astype(np.uint8), labels)


def pool(seed: int, count: int) -> Samples:
    """The first `count` samples, drawn in pieces that stay in the processor's cache."""
    pieces = [batch(seed, np.arange(start, min(start + 64, count))) for start in range(0, count, 64)]
    return Samples(*(np.concatenate(part) for part in zip(*pieces, strict=True)))


def _shape(shape: NDArray[np.int64], u: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Height within the shape in [-1, 1] and the share of each pixel that it covers; (N, 64, 64) each.

    The angle is folded onto half a point, where every outline is one line from the tip (R, 0) to the inner corner
    (rho R cos(pi / n), rho R sin(pi / n)); coverage is half a pixel minus the distance to it.
    """
    points, rho, hole, size = _OUTLINES[shape].T
    radius = size * (13.5 + 6.5 * u[:, 0])
    margin = radius * 0.95 + 1
    x = _AXIS[None, None, :] - (margin + (SIDE - 2 * margin) * u[:, 1])[:, None, None]
    y = _AXIS[None, :, None] - (margin + (SIDE - 2 * margin) * u[:, 2])[:, None, None]
    half = np.pi / points
    angle = np.arctan2(y, x) + (2 * np.pi * u[:, 3] + 2 * np.pi)[:, None, None]
    folded = np.abs(angle % (2 * half)[:, None, None] - half[:, None, None])
    inner_x, inner_y = rho * radius * np.cos(half), rho * radius * np.sin(half)
    normal_x, normal_y = inner_y, radius - inner_x
    length = np.hypot(normal_x, normal_y)
    normal_x, normal_y = (normal_x / length)[:, None, None], (normal_y / length)[:, None, None]
    distance = np.hypot(x, y)
    outside = distance * (np.cos(folded) * normal_x + np.sin(folded) * normal_y) - radius[:, None, None] * normal_x
    height = np.clip(y / radius[:, None, None], -1, 1)
    cut = (hole * radius)[:, None, None]
    outside = np.where(cut > 0, np.maximum(outside, cut - distance), outside)
    return np.broadcast_to(height, outside.shape), np.clip(0.5 - outside, 0, 1)


def _background(u: NDArray[np.float32]) -> NDArray[np.float32]:
    """Two muted colours, mixed along a gradient, in broad stripes or by a cloud; (N, 64, 64, 3)."""
    grey, tint = 50 + 110 * u[:, 0, None], 36 * (u[:, 1:4] - 0.5)
    near = grey + tint
    far = np.clip(grey + 130 * (u[:, 4, None] - 0.5), 40, 170) - tint
    unit = (_AXIS - SIDE / 2) / (SIDE / 2)
    angle = 2 * np.pi * u[:, 5]
    along = unit[None, None, :] * np.cos(angle)[:, None, None] + unit[None, :, None] * np.sin(angle)[:, None, None]
    gradient = 0.5 + along / 2.83
    stripes = 0.5 + 0.5 * np.sin(along * (4 + 4 * u[:, 6])[:, None, None] + 2 * np.pi * u[:, 7, None, None])
    grid = u[:, -(_CLOUD**2) :].reshape(-1, _CLOUD, _CLOUD)
    cloud = _UPSAMPLE @ grid @ _UPSAMPLE.T
    kind = (u[:, 8] * 3).astype(np.int64)[:, None, None]
    mix = np.select([kind == 0, kind == 1], [gradient, stripes], cloud)[..., None]
    return near[:, None, None, :] * (1 - mix) + far[:, None, None, :] * mix


def _upsampling() -> NDArray[np.float32]:
    """Smooth (cosine) interpolation of a row of the cloud's grid to the picture's side."""
    place = _AXIS / SIDE * (_CLOUD - 1)
    low = np.minimum(place.astype(np.int64), _CLOUD - 2)
    weight = (1 - np.cos(np.pi * (place - low))) / 2
    table = np.zeros((SIDE, _CLOUD), np.float32)
    rows = np.arange(SIDE)
    table[rows, low], table[rows, low + 1] = 1 - weight, weight
    return table


_UPSAMPLE = _upsampling()
