"""PixArt-alpha from prompts: T5 with a mask, the words in small letters."""

from __future__ import annotations

import pytest
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

from tests.families import tiny
from tests.families.elsewhere import Elsewhere
from tests.networks.tiny import pixart

pytestmark = pytest.mark.slow  # tests/test_pixart.py builds PixArt by default

TOKENS = 40


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> tiny.Case:
    tokenizer = tiny.t5_tokenizer()
    pipeline = PixArtAlphaPipeline(
        transformer=pixart(out_channels=8, caption_channels=64),
        scheduler=DPMSolverMultistepScheduler(),
        vae=tiny.vae(4, shift_factor=None, scaling_factor=0.18215),
        text_encoder=tiny.t5(tokenizer),
        tokenizer=tokenizer,
    )
    call = {"height": 64, "width": 64, "max_sequence_length": TOKENS}
    with one_thread():
        bundle = tiny.build(pipeline, tmp_path_factory.mktemp("pixart"), caption_tokens=TOKENS)
    return tiny.Case(pipeline, bundle, call | {"use_resolution_binning": False, "clean_caption": False})


def test_a_prompt_is_diffusers(case) -> None:
    tiny.accept(case)


class TestElsewhere(Elsewhere):
    """On OpenVINO, without PyTorch, in C++."""


def test_small_letters(case) -> None:
    """The tokenizer has capitals of its own, which the pipeline never shows it."""
    words = ("  A Photo of a CAT ",)
    assert min(tiny.distances(case.ours(words), case.theirs(words))) >= tiny.SAME
    assert min(tiny.distances(case.ours(words), case.ours(("a photo of a cat",)))) >= tiny.SAME
    assert max(tiny.distances(case.ours(("a photo of a cats",)), case.theirs(words))) < tiny.ANOTHER
