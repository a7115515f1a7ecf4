"""Noise as PyTorch's CPU generator draws it: one seed, one picture, in PyTorch, Python and C++."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import UsageError
from dit_runtime.sampling.process import is_integer

Draw = Callable[[tuple[int, ...]], NDArray[np.float32]]


class Noise:
    """One stream of `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`, draw after draw.

    MT19937 (Matsumoto and Nishimura 1998) seeded with the low 32 bits, then Box-Muller:
    n₁ = √(-2 ln u₁) cos(2π u₂), n₂ = √(-2 ln u₁) sin(2π u₂).
    """

    def __init__(self, seed: int) -> None:
        if not is_integer(seed) or not -(2**63) <= seed < 2**64:
            raise UsageError(f"seed is {seed!r}; expected an integer from -2**63 to 2**64 - 1")
        # RandomState is frozen by NumPy's own promise: init_genrand seeding, and the plain 32-bit stream below.
        self._engine = np.random.RandomState(int(seed) & 0xFFFFFFFF)
        self._cached: float | None = None  # the second value of a pair, for draws of fewer than 16

    def bits(self, count: int) -> NDArray[np.uint32]:
        """Return the next raw 32-bit integers of the stream."""
        return self._engine.randint(0, 2**32, size=count, dtype=np.uint32)

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return the next standard normal values: 16 and more by blocks, fewer by pairs, as in PyTorch."""
        size = math.prod(shape)
        if size < 16:
            return np.array([self._next() for _ in range(size)], np.float32).reshape(shape)
        uniforms = self._uniforms(size)
        values = np.empty(size, np.float32)
        whole = size - size % 16
        values[:whole] = _box_muller(uniforms[:whole])
        if size % 16:
            values[-16:] = _box_muller(self._uniforms(16))
        return values.reshape(shape)

    def _uniforms(self, count: int) -> NDArray[np.float32]:
        return (self.bits(count) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _next(self) -> float:
        """Return one value in float64; the sine of a pair waits for the next call, across draws."""
        if self._cached is not None:
            value, self._cached = self._cached, None
            return value
        high1, low1, high2, low2 = (int(word) for word in self.bits(4))
        angle = 2.0 * math.pi * (((high1 << 32 | low1) & (2**53 - 1)) * 2.0**-53)
        radius = math.sqrt(-2.0 * math.log1p(-((high2 << 32 | low2) & (2**53 - 1)) * 2.0**-53))
        self._cached = radius * math.sin(angle)
        return radius * math.cos(angle)


def draw(seeds: int | Sequence[int], batch: int) -> Draw:
    """Return the source of a run's noise: one stream for the batch (an int, as PyTorch), or one a sample (a list).

    A run draws x_T first, then once for every step that adds noise.
    """
    if isinstance(seeds, Sequence) and not isinstance(seeds, str):
        if len(seeds) != batch:
            expected = "one seed, or one a sample: give each picture its prompt or label"
            raise UsageError(f"{len(seeds)} seeds for {batch} samples; expected {expected}")
        streams = [Noise(seed) for seed in seeds]
        return lambda shape: np.concatenate([stream.normal((1, *shape[1:])) for stream in streams])
    return Noise(seeds).normal


def _box_muller(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn blocks of 16 uniforms, 8 radii and 8 angles, into 16 normals each; every operation rounds to float32.

    log, sin and cos are taken in float64 and rounded, so that Python and C++ get the same bits from different
    maths libraries; PyTorch's own vector routines are within one ulp of that.
    """
    blocks = uniforms.reshape(-1, 2, 8)
    u1, u2 = np.float32(1) - blocks[:, 0], blocks[:, 1]
    radius = np.sqrt(np.float32(-2) * np.log(u1, dtype=np.float64).astype(np.float32))
    angle = (np.float32(2 * math.pi) * u2).astype(np.float64)
    pair = [radius * np.cos(angle).astype(np.float32), radius * np.sin(angle).astype(np.float32)]
    return np.stack(pair, axis=1).reshape(-1)
