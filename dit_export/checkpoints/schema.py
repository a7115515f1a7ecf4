"""The schema of a checkpoint's JSON: plain values within ranges, before any class is built of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_runtime.errors import UsageError
from dit_runtime.facts import LIMITS
from dit_runtime.files import read_json

# The largest integer under a name that has such a part; the first that fits counts.
RANGES: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(part), most)
    for part, most in (
        (r"layers|blocks|depth", 512),
        (r"heads|groups|experts", 4096),
        (r"sample_|max_size|frames", 1024),
        (r"patch", 64),
        (r"", 1 << 24),
    )
)
INDEX = "model_index.json"
KEYS, NUMBERS, TEXTS, TEXT, DEPTH = LIMITS["classes"], LIMITS["classes"], 64, 1 << 16, 4
POSITIONS = 1 << 28  # numbers of a table of positions
SIDE, PATCH, WIDTH = "sample_size", "patch_size", ("num_attention_heads", "attention_head_dim")


def read_config_json(path: Path) -> dict[str, Any]:
    """Return a config, a table of plain values within their ranges."""
    config = read_json(path, constants=True)  # diffusers writes them
    if not isinstance(config, dict):
        raise UsageError(f"{path}: expected an object, got {type(config).__name__}")
    for name, value, depth in _values(config, "", 0):
        if reason := _refusal(name, value, depth):
            raise UsageError(f"{path}: {name}{reason}")
    side, patch, *width = (_positive(config.get(key)) for key in (SIDE, PATCH, *WIDTH))
    if (side // patch) ** 2 * math.prod(width) > POSITIONS:
        raise UsageError(f"{path}: {SIDE} is {side}, too many positions of {' x '.join(map(str, width))} numbers")
    return config


def _positive(value: Any) -> int:
    return value if type(value) is int and value > 0 else 1


def read_index(pipeline: Path) -> dict[str, Any]:
    """Return the config of a pipeline; {} where the folder is none."""
    index = pipeline / INDEX
    return read_config_json(index) if index.exists() else {}


def _values(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any, int]]:
    """Yield every value with the name of its field, those that hold others first."""
    yield name, value, depth
    if depth <= DEPTH and isinstance(value, dict | list) and len(value) <= KEYS:
        for key, inner in value.items() if isinstance(value, dict) else ((name, inner) for inner in value):
            yield from _values(inner, key, depth + 1)


def _refusal(name: str, value: Any, depth: int) -> str | None:
    """Return what is wrong with a value, None where nothing is."""
    if depth > DEPTH:
        return f" holds tables in each other more than {DEPTH} deep"
    if isinstance(value, dict | list):
        most = TEXTS if isinstance(value, list) and any(isinstance(inner, str) for inner in value) else NUMBERS
        return f" has {len(value)} entries, expected at most {most}" if len(value) > most else None
    if isinstance(value, str):
        return f" has {len(value)} characters, expected at most {TEXT}" if len(value) > TEXT else None
    if isinstance(value, float):
        return f" is {value!r}, expected a number" if math.isnan(value) else None
    if type(value) is int:
        most = next(most for part, most in RANGES if part.search(name))
        return f" is {value}, expected at most {most} either way" if abs(value) > most else None
    return None
