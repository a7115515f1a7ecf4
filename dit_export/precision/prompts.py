"""A user's own captions to calibrate with: what a text encoder made of some texts, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dit_export.arrays import read_arrays
from dit_export.networks.spec import ModelSpec
from dit_runtime.captions import EXAMPLES, Captions, examples, fitting
from dit_runtime.errors import UsageError

NAMES = ("captions", "mask", "negative", "negative_mask")  # as `dit-run sample` calls them


class Prompts(NamedTuple):
    captions: Captions
    negative: Captions  # the one that guidance leads away from


def read(path: Path, spec: ModelSpec) -> Prompts:
    """An .npy file holds the captions, an .npz file NAMES; without a negative one it is verification's."""
    if not spec.by.captioned:
        raise UsageError(f"captions {path}: this network takes labels; leave them out")
    shape = spec.caption_tokens, spec.caption_channels
    arrays = {name or "captions": array for name, array in read_arrays(path, "captions as .npy or .npz").items()}
    if unknown := [name for name in arrays if name not in NAMES]:
        raise UsageError(f"{path}: unknown array {unknown[0]!r}; known: {', '.join(NAMES)}")
    if "captions" not in arrays:
        raise UsageError(f"{path}: no captions in it; got {', '.join(arrays) or 'nothing'}")
    if "negative_mask" in arrays and "negative" not in arrays:
        raise UsageError(f"{path}: negative_mask without negative")

    def fitted(name: str, mask: str) -> Captions:
        given = Captions(arrays[name], arrays[mask]) if mask in arrays else arrays[name]
        return fitting(given, *shape, f"{path}: {name}")

    captions = fitted("captions", "mask")
    negative = fitted("negative", "negative_mask") if "negative" in arrays else examples([EXAMPLES], *shape)
    if len(negative.mask) != 1:
        raise UsageError(f"{path}: {len(negative.mask)} negative captions; expected one")
    return Prompts(captions, negative)
