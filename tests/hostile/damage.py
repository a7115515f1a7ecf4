"""Damage to one file of a checkpoint: another field, other content, a pipe or a folder in its place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Apply = Callable[[Path], object]
REMOVED = object()


class Damage(NamedTuple):
    name: str
    apply: Apply  # to the checkpoint
    verdict: str = "refused"  # or "fine", or "survives": either
    kind: str = "dit"  # or pixart, a pipeline with a text encoder; or meta, a .pt of Meta's


def setting(file: str, key: str, value: Any) -> Apply:
    def apply(place: Path) -> None:
        table = json.loads((place / file).read_text())
        if value is REMOVED:
            table.pop(key, None)
        else:
            table[key] = value
        (place / file).write_text(json.dumps(table))

    return apply


def written(file: str, content: bytes) -> Apply:
    return lambda place: (place / file).write_bytes(content)


def pipe(file: str) -> Apply:
    def apply(place: Path) -> None:
        (place / file).unlink()
        os.mkfifo(place / file)

    return apply


def folder_at(file: str) -> Apply:
    def apply(place: Path) -> None:
        (place / file).unlink()
        (place / file).mkdir()

    return apply
