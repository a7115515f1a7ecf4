"""A bundle's prompt stage against PyTorch's encoders, and the proof that this comparison can fail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dit_export.networks import fixtures
from dit_export.networks.fixtures import TEXTS
from dit_export.networks.text import PromptEncoder
from dit_export.verify.parity import PROOF_LIMIT
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.conditions.condition import Rows
from dit_runtime.pipeline import Pipeline
from dit_runtime.verify import TOLERANCES, Figure, prompts, relative_error


def prompt_parity(pipe: Pipeline, text: PromptEncoder) -> Iterator[Figure]:
    """Compare the stage at 1, 2 and 3 prompts of different lengths, and its answers with each other.

    Captions of a few tokens have the same mask for all prompts; nothing is asked of such a mask.
    """
    stage = pipe.manifest.prompt
    assert stage is not None
    limit = TOLERANCES[pipe.manifest.step.precision].prediction
    for count in range(1, len(TEXTS) + 1):
        rows = pipe.engines.tokenizers(TEXTS[:count], whole=False)
        got, expected = pipe.engines.run(stage, rows), encode(text, rows)
        for name, values in got.items():
            error, place = relative_error(values, expected[name]), f"batch {count}"
            yield Figure(stage.name, f"{name} at a batch, rel-L2", error, limit, where=place)
    masks = {port.name for port in pipe.manifest.conditions if port.masks}
    for name, values in got.items():
        changes, expected_changes = (_changes(rows) for rows in (values, expected[name]))
        if name not in masks or any(expected_changes):
            metric = f"{name} of another prompt, rel-L2"
            yield Figure(stage.name, metric, max(changes), PROOF_LIMIT, at_least=True)


def _changes(rows: NDArray[np.float32]) -> list[float]:
    """Return how far each further row is from the first."""
    return [relative_error(row, rows[0]) for row in rows[1:]]


def first_failure(contract: Manifest, checks: Iterable[Figure]) -> Figure | None:
    """Return the first gate that the text encoders fail in another precision than fp32."""
    stage = contract.prompt
    if stage is None or contract.step.precision == "fp32":
        return None
    figures = (figure for figure in checks if figure.stage.removeprefix("twin: ") == stage.name)
    return next((figure for figure in figures if not figure.passed), None)


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
