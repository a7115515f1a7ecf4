"""Hostile bundles and checkpoints as recipes: a name, what is done to a copy of a sound one, and the verdict.

Python and C++ are held to the same verdicts. `bundles.BUNDLES` damages a hand-made bundle of `kind` (the fixture
`handmade`, make_bundle.py); `checkpoints.CHECKPOINTS` damages a folder that diffusers wrote, or a bare file of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ACCEPTED, FAILED, REFUSED = 0, 1, 2  # exit codes
# Verdict -> the exit code of each command; None: any of the three.
VERDICTS: dict[str, dict[str, int | None]] = {
    "fine": {"info": ACCEPTED, "sample": ACCEPTED, "verify": ACCEPTED},
    "read": {"info": REFUSED, "sample": REFUSED, "verify": REFUSED},  # the manifest, or a file that it lists
    "open": {"info": ACCEPTED, "sample": REFUSED, "verify": REFUSED},  # a graph or its weights
    "decoder": {"info": ACCEPTED, "sample": None, "verify": REFUSED},  # whose pictures a sample of latents lacks
    "verify": {"info": ACCEPTED, "sample": ACCEPTED, "verify": REFUSED},  # the reference
    "fails": {"info": ACCEPTED, "sample": ACCEPTED, "verify": FAILED},  # whole, and draws other pictures
    "survives": {"info": None, "sample": None, "verify": None},
}


class Damage(NamedTuple):
    name: str
    apply: Callable[[Path], object]  # to the folder
    verdict: str = "read"  # one of VERDICTS
    kind: str = "labels"  # of make_bundle.py
