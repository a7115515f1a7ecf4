"""Replays reference.npz, PyTorch's own answer, with NumPy and the engines alone, and judges what they give."""

from dit_runtime.verify.figures import Figure, jsonable, outcome, summary, table, worst
from dit_runtime.verify.judge import (
    INVARIANCE,
    NOISE_ATOL,
    TOLERANCES,
    Tolerances,
    batch_invariant,
    by_size,
    judge,
    prompt_figures,
    sampler,
    tolerances,
    verify,
)
from dit_runtime.verify.reference import REFERENCE, Reference, fingerprint, load_reference
from dit_runtime.verify.replay import Answer, Invariance, Replay, cosine, latents_psnr, relative_error, replay

__all__ = [
    "INVARIANCE",
    "NOISE_ATOL",
    "REFERENCE",
    "TOLERANCES",
    "Answer",
    "Figure",
    "Invariance",
    "Reference",
    "Replay",
    "Tolerances",
    "batch_invariant",
    "by_size",
    "cosine",
    "fingerprint",
    "jsonable",
    "judge",
    "latents_psnr",
    "load_reference",
    "outcome",
    "prompt_figures",
    "relative_error",
    "replay",
    "sampler",
    "summary",
    "table",
    "tolerances",
    "verify",
    "worst",
]
