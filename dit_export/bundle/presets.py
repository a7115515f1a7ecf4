"""A user's presets, from the file that `dit-export tune --presets` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_runtime.bundle.checks import check_presets
from dit_runtime.errors import UsageError
from dit_runtime.files import read_json
from dit_runtime.sampling.process import Process


def read_presets(path: Path, process: Process) -> dict[str, Any]:
    """Read presets by name; refuse those that a bundle with this process cannot take."""
    try:
        presets = read_json(path)
        if not isinstance(presets, dict):
            raise ValueError(f"got {type(presets).__name__}, expected a table of presets by name")
        check_presets(presets, process)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; make it with `dit-export tune BUNDLE --presets {path}`") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    return presets
