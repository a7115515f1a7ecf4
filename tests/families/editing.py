"""Latents of diffusers' pipelines that start from pictures, and of a bundle of the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dit_runtime import Pipeline
from dit_runtime.verify import latents_psnr
from tests.families import tiny

SAME, ANOTHER = 100.0, 50.0  # dB by the latents' range: fp32 sums in another order; what a wrong input must stay under
STEPS = 5


class Pipelines(NamedTuple):
    """Classes of diffusers."""

    image: Any
    inpainting: Any


@dataclass(frozen=True)
class Edit:
    """A case whose bundle has an encoder."""

    case: tiny.Case
    pipelines: Pipelines
    masked: bool

    @cached_property
    def pictures(self) -> NDArray[np.uint8]:
        """Smooth pictures of the case's size, (3, H, W, 3)."""
        small = np.random.default_rng(3).integers(0, 256, (3, 4, 4, 3), np.uint8)
        size = self.case.call["width"], self.case.call["height"]
        return np.stack([Image.fromarray(part).resize(size, Image.Resampling.BICUBIC) for part in small])

    @cached_property
    def mask(self) -> NDArray[np.uint8]:
        """A place to draw anew, grey at its edges, that ends within a cell of the latents."""
        mask = np.zeros((self.case.call["height"], self.case.call["width"]), np.uint8)
        mask[12:50, 6:43], mask[20:44, 10:40] = 100, 255
        return mask

    def theirs(self, strength: float, guidance: float = tiny.GUIDANCE, count: int = 1) -> NDArray[np.float32]:
        case = self.case
        pipeline = self.pipelines[self.masked](**case.pipeline.components)
        pipeline.set_progress_bar_config(disable=True)
        options = {case.weight: guidance, "num_inference_steps": STEPS, "output_type": "latent", "strength": strength}
        if case.negative is not None:
            options["negative_prompt"] = [case.negative] * count
        if self.masked:
            options["mask_image"] = Image.fromarray(self.mask)
        generators = [torch.Generator().manual_seed(tiny.SEED + number) for number in range(count)]
        with torch.no_grad():
            latents = pipeline(
                prompt=list(tiny.PROMPTS[:count]),
                image=[Image.fromarray(picture) for picture in self.pictures[:count]],
                generator=generators,
                **options | dict(case.call),
            ).images
        if latents.ndim == 3:  # packed
            latents = pipeline._unpack_latents(latents, case.call["height"], case.call["width"], 8)
        return (latents[:, :, 0] if latents.ndim == 5 else latents).numpy()  # of one frame

    def ours(
        self, strength: float, guidance: float = tiny.GUIDANCE, count: int = 1, **request: Any
    ) -> NDArray[np.float32]:
        options = {"image": self.pictures[:count], "mask": self.mask if self.masked else None, "strength": strength}
        options |= {"prompt": list(tiny.PROMPTS[:count]), "negative_prompt": self.case.negative}
        options |= {"seed": [tiny.SEED + number for number in range(count)], "guidance": guidance, "steps": STEPS}
        with Pipeline.load(self.case.bundle, threads=1, size=self.case.size) as pipe:
            return pipe.sample(**options | request, output="latents")

    def distance(self, **call: Any) -> float:
        """Return the least PSNR of a sample."""
        return least(self.ours(**call), self.theirs(**call))


def accept_encoder(case: tiny.Case, encode: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Compare the latents of pictures with diffusers', where no pipeline of diffusers starts from them.

    `encode` takes images in [-1, 1]. A run that a black mask keeps ends at these latents; without a mask, a run depends
    on its picture.
    """
    edit = Edit(case, Pipelines(None, None), True)
    rows = torch.from_numpy(edit.pictures).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        expected = encode(2 * rows - 1).numpy()
    with Pipeline.load(case.bundle, threads=1) as pipe:
        got = pipe.engines.encode_pictures(rows.numpy())
    assert got.keys() == {"mean"} and least(got["mean"], expected) >= SAME
    assert least(got["mean"][::-1], expected) < ANOTHER
    black = np.zeros_like(edit.mask)
    assert least(edit.ours(0.6, count=3, mask=black), expected) >= SAME
    drawn = [edit.ours(0.6, mask=None, image=picture) for picture in edit.pictures[:2]]
    assert least(drawn[0], expected[:1]) < ANOTHER
    assert least(*drawn) < SAME  # little of a picture is left where a shift starts a run at large σ


def least(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return min(latents_psnr(*pair) for pair in zip(got, expected, strict=True))


def accept(edit: Edit, another_image: float = ANOTHER, **call: Any) -> None:
    """Compare with diffusers, and with what must differ: another strength, seed, image, mask.

    Runs from `another_image` stay under so many dB: an encoder of random weights may hardly tell pictures apart.
    """
    expected = edit.theirs(**call)
    assert least(edit.ours(**call), expected) >= SAME
    changes: list[dict[str, Any]] = [
        {"strength": 0.3},
        {"seed": tiny.SEED + 9},
        {"image": edit.pictures[::-1][: call["count"]]},
    ]
    changes += [{"mask": None}, {"mask": 255 - edit.mask}] if edit.masked else []
    for change in changes:
        limit = another_image if "image" in change else ANOTHER
        assert least(edit.ours(**call | change), expected) < limit, change.keys()
    if edit.masked:  # the last step puts the picture's own latents back
        cells = edit.mask[::8, ::8] < 128
        outside = edit.ours(**call)[:, :, cells]
        assert np.array_equal(outside, edit.ours(**call | {"guidance": 1.5})[:, :, cells])
