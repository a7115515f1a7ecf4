"""Captions of ours to calibrate with, as a pipeline's text encoders make conditions of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dit_export.networks import Network, fixtures
from dit_export.networks.text import PromptEncoder
from dit_export.precision.prompts import Prompts
from dit_export.verify.text import encode
from dit_runtime.conditions.condition import Rows

# Short and long, of all that people ask for: the encoders' outliers depend on the words and on how many there are.
CAPTIONS = (
    "a cat",
    "a photo of a red bicycle against a white wall",
    "portrait of an old fisherman with a grey beard, soft light from a window, film grain",
    "two children run across a wet beach at sunset, seen from far behind",
    "a bowl of ramen with two halves of an egg, close-up, steam, dark wooden table",
    "a lighthouse on a cliff in a storm, oil painting with thick strokes",
    'a shop window with a sign that says "OPEN UNTIL 9"',
    "isometric drawing of a small room with a desk, a bed and many plants, pastel colours",
    "logo of a fox made of three triangles, flat, orange on black",
    "a street in Tokyo at night in the rain, neon reflections, people with umbrellas, wide angle, 35 mm",
    "東京の雨の夜、傘をさす人々",
    "Ein Bergsee im Morgennebel, davor ein Holzsteg",
    "a steam engine crosses a stone bridge over a valley of autumn trees",
    "an astronaut plays chess with a robot on the moon, the earth above them",
    "macro photo of a dew drop on a blade of grass",
    "pencil sketch of a horse that gallops, on yellowed paper",
    "a kitchen of the year 1950 with a green stove, a radio on the shelf and a calendar on the wall; a woman in a blue"
    " dress cuts bread, a boy looks out of the window at the snow, and a dog sleeps under the table",
    "satellite view of a river delta",
    "blurry, low quality",
    "",
)
ROWS = 4  # that the encoders read at once
TOKENS = 12_000  # that they read in all: Gemma 2 2B reads 38 a second on two cores


def choose(text: PromptEncoder) -> Sequence[str]:
    """Return all captions, or every second or third for encoders that pad each to very many tokens."""
    longest = max(prompt.tokens for prompt in text.prompts)
    return CAPTIONS[:: -(-len(CAPTIONS) * longest // TOKENS)]


def embed(network: Network, text: PromptEncoder) -> Prompts:
    """Return the conditions of the captions and of the empty negative prompt; other ports have the fixtures."""
    words = choose(text)
    own, away = _encode(text, words, False), _encode(text, ("",), True)
    return Prompts(fixtures.conditions(network, len(words)) | own, fixtures.null(network) | away)


def _encode(text: PromptEncoder, words: Sequence[str], negative: bool) -> Rows:
    rows = fixtures.tokenize(text, words, negative)
    parts = [
        encode(text, {name: values[first : first + ROWS] for name, values in rows.items()})
        for first in range(0, len(words), ROWS)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
