"""Replays reference.npz, PyTorch's own answer, with NumPy and the engines alone, and judges what they give."""

from dit_runtime.verify.figures import Figure, jsonable, summary, table, worst
from dit_runtime.verify.judge import NOISE_ATOL, TOLERANCES, Tolerances, judge, sampler, tolerances, verify
from dit_runtime.verify.reference import REFERENCE, Reference, fingerprint, load_reference
from dit_runtime.verify.replay import Answer, Replay, cosine, relative_error, replay

__all__ = [
    "NOISE_ATOL",
    "REFERENCE",
    "TOLERANCES",
    "Answer",
    "Figure",
    "Reference",
    "Replay",
    "Tolerances",
    "cosine",
    "fingerprint",
    "jsonable",
    "judge",
    "load_reference",
    "relative_error",
    "replay",
    "sampler",
    "summary",
    "table",
    "tolerances",
    "verify",
    "worst",
]
