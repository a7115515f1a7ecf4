"""Captions, as a text encoder embeds them, and made-up ones by which a bundle is verified without a text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime.conditioning import Put
from dit_runtime.errors import UsageError
from dit_runtime.sampling.noise import Noise

EXAMPLES = 4  # made-up captions 0 … 3; number 4 is the one that guidance leads away from


class Captions(NamedTuple):
    embeddings: NDArray[np.float32]  # (N, L, C)
    mask: NDArray[np.float32]  # (N, L): 1 where the caption has a token, else 0


def examples(numbers: Sequence[int] | NDArray[np.int64], tokens: int, channels: int) -> Captions:
    """Made-up captions by their numbers, the same everywhere; the higher its number, the fewer tokens one has."""
    embeddings = [Noise(int(number)).normal((tokens, channels)) for number in numbers]
    lengths = np.array([tokens - int(number) * tokens // (EXAMPLES + 1) for number in numbers])
    return Captions(np.stack(embeddings), (np.arange(tokens) < lengths[:, None]).astype(np.float32))


class Context(NamedTuple):
    """What the denoiser reads of captions in every step."""

    vectors: NDArray[np.float32]  # (N, M, D): keys and values for each block
    mask: NDArray[np.float32]  # (N, L): added to their scores


class Contexts:
    """The denoiser's inputs that do not change from step to step; none where there are classes."""

    def __init__(self, own: Context | None = None, null: Context | None = None, put: Put = np.asarray) -> None:
        """`null` is what guidance leads away from: one for all, or one a sample; None without guidance."""
        self._own, self._null, self._put = own, null, put
        self._held: tuple[slice | None, dict[str, Any]] = None, {}

    def __call__(self, samples: slice) -> dict[str, Any]:
        """`context` [G, B, M, D] and `context_mask` [G, B, L] for some of the samples: their own first.

        Those of the last call are kept, XL/2's 62 MB a sample: a run that fits the engine always asks for the same.
        """
        if self._own is not None and self._held[0] != samples:
            self._held = samples, {}  # before there are others
            self._held = samples, {name: self._put(part) for name, part in self._groups(self._own, samples).items()}
        return self._held[1]

    def _groups(self, own: Context, samples: slice) -> dict[str, NDArray[np.float32]]:
        groups = [Context(*(part[samples] for part in own))]
        if self._null is not None:
            null = self._null if len(self._null.mask) == 1 else Context(*(part[samples] for part in self._null))
            groups.append(Context(*map(np.broadcast_to, null, (part.shape for part in groups[0]))))
        vectors, mask = map(np.stack, zip(*groups, strict=True))
        return {"context": vectors, "context_mask": mask}


def fitting(captions: Captions | NDArray[Any], tokens: int, channels: int, what: str) -> Captions:
    """Captions as a bundle takes them: (N, L, C), shorter ones filled up; without a mask every token counts."""
    embeddings = np.asarray(captions.embeddings if isinstance(captions, Captions) else captions)
    mask = np.asarray(captions.mask) if isinstance(captions, Captions) else np.ones(embeddings.shape[:2])
    if embeddings.ndim != 3 or not embeddings.size or embeddings.shape[2] != channels or embeddings.shape[1] > tokens:
        raise UsageError(f"{what} have shape {embeddings.shape}; expected (captions, up to {tokens}, {channels})")
    if mask.shape != embeddings.shape[:2] or not np.isin(mask, (0, 1)).all() or not mask.any(axis=1).all():
        raise UsageError(
            f"{what}: the mask has shape {mask.shape}; expected {embeddings.shape[:2]} of 0 and 1, a 1 in every row"
        )
    if embeddings.dtype.kind not in "fiub":
        raise UsageError(f"{what} are {embeddings.dtype}; expected numbers")
    if not np.isfinite(embeddings).all():
        raise UsageError(f"{what} hold values that are not finite")
    missing = tokens - mask.shape[1]
    filled = np.pad(embeddings, ((0, 0), (0, missing), (0, 0))), np.pad(mask, ((0, 0), (0, missing)))
    return Captions(*(part.astype(np.float32) for part in filled))
