"""Class names, one an id: from a file of the user's or from a pipeline's model_index.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_export.checkpoints.schema import INDEX, read_index
from dit_runtime.errors import UsageError
from dit_runtime.files import parse_json, read_text


def read_labels(path: Path, num_classes: int) -> tuple[str, ...]:
    """A name a line, a JSON list of names, or a JSON object of id -> name."""
    text = read_text(path)
    if text.lstrip().startswith(("[", "{")):
        return by_id(parse_json(text, str(path)), num_classes, str(path))
    return by_id([line.strip() for line in text.strip().splitlines()], num_classes, str(path))


def pipeline_labels(folder: Path, num_classes: int) -> tuple[str, ...]:
    table = read_index(folder).get("id2label")
    return by_id(table, num_classes, f"{folder / INDEX}: id2label") if table else ()


def by_id(names: Any, num_classes: int, where: str) -> tuple[str, ...]:
    if isinstance(names, list):
        names = {str(index): name for index, name in enumerate(names)}
    if not isinstance(names, dict):
        raise UsageError(f"{where}: got {type(names).__name__}, expected a list of names, or a table of them by number")
    if len(names) != num_classes:
        raise UsageError(f"{where}: got {len(names)} names, expected {num_classes}, one a class")
    ordered: list[Any] = [names.get(str(index)) for index in range(num_classes)]
    for index, name in enumerate(ordered):
        if not isinstance(name, str) or not name:
            raise UsageError(f"{where}: class {index} has the name {name!r}, expected a text")
    return tuple(ordered)
