"""Image-to-image and inpainting: start a run from a picture's latents, and restore what a mask keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import UsageError
from dit_runtime.facts import DEFAULT_STRENGTH
from dit_runtime.sampling.denoiser import Array
from dit_runtime.sampling.noise import Draw
from dit_runtime.sampling.process import is_number
from dit_runtime.sampling.schedule import Level

CLEAN = Level(0.0, 1.0, 0.0)


def first_step(steps: int, strength: float | None) -> int:
    """Return how many steps a run skips that starts from a noised picture (SDEdit, Meng et al. 2021, arXiv 2108.01073).

    The share is rounded as diffusers rounds it.
    """
    share = DEFAULT_STRENGTH if strength is None else strength
    if not is_number(share) or not 0 < share <= 1:
        raise UsageError(f"strength is {strength!r}; expected a number above 0, up to 1")
    first = int(max(steps - min(steps * share, steps), 0))
    if first == steps:
        raise UsageError(f"strength is {strength!r}; of {steps} steps it leaves none: take more of one of them")
    return first


class Start:
    """A picture's latents, and noise of the run's own: the state before the first step, and what is kept after each."""

    def __init__(
        self, encoded: Mapping[str, NDArray[np.float32]], shape: tuple[int, ...], draw: Draw, levels: Sequence[Level]
    ) -> None:
        """Draw the latents where the encoder gives a variance, then the noise, as diffusers' pipelines do.

        `encoded` has a row for each sample, or one for all; `levels` are those of the evaluations.
        """
        self._latents = np.broadcast_to(encoded["mean"].astype(np.float64), shape)
        if "logvar" in encoded:
            self._latents = self._latents + np.exp(0.5 * encoded["logvar"].astype(np.float64)) * draw(shape)
        self._noise = draw(shape).astype(np.float64)
        self._levels = [*levels, CLEAN]

    def at(self, evaluations: int) -> Array:
        """Return the latents with the noise that a state has after so many evaluations."""
        level = self._levels[evaluations]
        noisy: Array = level.alpha * self._latents + level.sigma * self._noise
        return noisy

    def keep(self, evaluations: int, state: Array, mask: NDArray[np.float32]) -> Array:
        """Return the state with the latents in the places where the mask, (B or 1, 1, H, W), is 0."""
        return np.where(mask == 0, self.at(evaluations), state)
