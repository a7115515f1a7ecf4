"""Class names, one an id: from a file of the user's or from a pipeline's model_index.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_export.checkpoints.files import read_json
from dit_runtime.errors import UsageError


def read_labels(path: Path, num_classes: int) -> tuple[str, ...]:
    """A name a line, a JSON list of names, or a JSON object of id -> name."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text: {error}") from None
    if text.lstrip().startswith(("[", "{")):
        return by_id(read_json(path), num_classes, str(path))
    return by_id([line.strip() for line in text.strip().splitlines()], num_classes, str(path))


def pipeline_labels(folder: Path, num_classes: int) -> tuple[str, ...]:
    path = folder / "model_index.json"
    table = read_json(path).get("id2label") if path.is_file() else None
    return by_id(table, num_classes, f"{path}: id2label") if table else ()


def by_id(names: Any, num_classes: int, where: str) -> tuple[str, ...]:
    if isinstance(names, list):
        names = {str(index): name for index, name in enumerate(names)}
    if len(names) != num_classes:
        raise UsageError(f"{where}: got {len(names)} names, expected {num_classes}, one a class")
    ordered = [names.get(str(index)) for index in range(num_classes)]
    for index, name in enumerate(ordered):
        if not isinstance(name, str) or not name:
            raise UsageError(f"{where}: class {index} has the name {name!r}, expected a text")
    return tuple(ordered)
