"""A bundle's prompt stage against PyTorch's encoders, and the proof that this comparison can fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dit_export.networks import fixtures
from dit_export.networks.fixtures import TEXTS
from dit_export.networks.text import PromptEncoder
from dit_export.verify.parity import PROOF_LIMIT
from dit_runtime.conditions.condition import Rows
from dit_runtime.pipeline import Pipeline
from dit_runtime.verify import TOLERANCES, Figure, prompts, relative_error


def prompt_parity(pipe: Pipeline, text: PromptEncoder) -> Iterator[Figure]:
    """Compare the stage at 1, 2 and 3 prompts of different lengths, then with the answer to another prompt."""
    stage = pipe.manifest.prompt
    assert stage is not None
    limit = TOLERANCES[pipe.manifest.step.precision].prediction
    for count in range(1, len(TEXTS) + 1):
        rows = pipe.engines.tokenizers(TEXTS[:count], whole=False)
        got, expected = pipe.engines.run(stage, rows), encode(text, rows)
        for name, values in got.items():
            error, place = relative_error(values, expected[name]), f"batch {count}"
            yield Figure(stage.name, f"{name} at a batch, rel-L2", error, limit, where=place)
    answers = (pipe.engines.run(stage, pipe.engines.tokenizers(words, whole=False)) for words in (TEXTS[0], TEXTS[2]))
    first, other = answers
    for name, values in first.items():
        error = relative_error(other[name], values)
        yield Figure(stage.name, f"{name} of another prompt, rel-L2", error, PROOF_LIMIT, at_least=True)


def save_prompts(folder: Path, text: PromptEncoder) -> None:
    """Write ids and PyTorch's answer to them, for machines without PyTorch."""
    ids = fixtures.token_ids(text)
    prompts.save(folder, ids, encode(text, ids))


@torch.no_grad()
def encode(text: PromptEncoder, rows: Rows) -> dict[str, NDArray[np.float32]]:
    """Return PyTorch's conditions of these ids."""
    outputs = text.module(**{name: torch.from_numpy(values) for name, values in rows.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {name: np.asarray(values) for name, values in zip(text.gives, outputs, strict=True)}
