"""prompts.npz: made-up token ids and projections of what PyTorch's text encoders give for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle import manifest
from dit_runtime.conditions.condition import fit
from dit_runtime.conditions.text import PromptMemo
from dit_runtime.errors import BundleError, UsageError
from dit_runtime.pipeline import Pipeline
from dit_runtime.sampling.noise import Noise
from dit_runtime.verify.reference import FINGERPRINT_SEED, FINGERPRINTS
from dit_runtime.verify.replay import relative_error

PROMPTS = "prompts.npz"
FINGERPRINT = "fingerprint."  # begins the names of the projections


def project(conditions: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """Return a few seeded projections of each row, by port: (rows, FINGERPRINTS)."""
    projections = {}
    for name, values in conditions.items():
        rows = values.reshape(len(values), -1)
        directions = Noise(FINGERPRINT_SEED).normal((rows.shape[1], FINGERPRINTS)) / math.sqrt(rows.shape[1])
        projections[name] = (rows @ directions).astype(np.float32)
    return projections


def save(folder: Path, ids: Mapping[str, NDArray[Any]], conditions: Mapping[str, NDArray[Any]]) -> None:
    """Write ids and masks by name, and the projections of PyTorch's conditions by port."""
    arrays: dict[str, Any] = {FINGERPRINT + name: values for name, values in project(conditions).items()}
    arrays |= ids
    np.savez(folder / PROMPTS, **arrays)


def errors(pipe: Pipeline) -> Iterator[tuple[str, int, float]]:
    """Yield, by port, the row whose projections differ most from PyTorch's, and by how much."""
    contract, stage = pipe.manifest, pipe.manifest.prompt
    if stage is None:
        return
    if PROMPTS not in contract.files:
        lacks = f"{PROMPTS} is not in the manifest, and nothing else checks the {stage.name} stage"
        raise BundleError(f"{pipe.folder}: {lacks}; rebuild the bundle")
    names = [port.name for port in contract.prompt_ports]
    try:
        with manifest.checking(pipe.folder, contract, [PROMPTS]):
            arrays = manifest.read_arrays(pipe.folder, PROMPTS)
        ids = fit({name: arrays[name] for name in names}, contract.prompt_ports, PROMPTS)
        expected = {spec.name: arrays[FINGERPRINT + spec.name] for spec in stage.gives}
    except KeyError as error:
        raise BundleError(f"{pipe.folder}: {PROMPTS} lacks {error.args[0]}; rebuild the bundle") from None
    except UsageError as error:
        raise BundleError(f"{pipe.folder}: {PROMPTS} does not fit: {error}; rebuild the bundle") from None
    for name, values in project(PromptMemo(stage, pipe.engines.run)(ids)).items():
        if values.shape != expected[name].shape:
            what = f"{PROMPTS} has {FINGERPRINT}{name} of shape {[*expected[name].shape]}"
            raise BundleError(f"{pipe.folder}: {what}, expected {[*values.shape]}; rebuild the bundle")
        distances = [relative_error(*pair) for pair in zip(values, expected[name], strict=True)]
        row = int(np.nan_to_num(distances, nan=np.inf).argmax())
        yield name, row, distances[row]
