"""Every value of a manifest in turn is of each wrong kind, and every key in turn is missing."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

REMOVED = object()
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**30, -(10**30), 1e308, "", "x", "\x1b[2J\n", "\ud800", [], {}, [None], [[]], {"x": 1},
    ["a"] * 1000, REMOVED,
)  # fmt: skip
FOR_PEOPLE = ("source", "built_with", "model", "parity")  # what stands inside these has no kinds
Place = tuple[str | int, ...]


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield *path, key
        if isinstance(inner, dict | list) and key not in FOR_PEOPLE:
            yield from places(inner, (*path, key))


def mutations(folder: Path, every: int = 1) -> Iterator[tuple[str, str]]:
    """Yield a name and the text of each changed manifest of this bundle, or of one of so many."""
    good = json.loads((folder / "manifest.json").read_text())
    for place, value in islice(product(places(good), VALUES), 0, None, every):
        table: Any = copy.deepcopy(good)
        inner = table
        for key in place[:-1]:
            inner = inner[key]
        if value is REMOVED:
            del inner[place[-1]]
        else:
            inner[place[-1]] = value
        shown = "removed" if value is REMOVED else repr(value)[:20]
        yield f"{'.'.join(map(str, place))} = {shown}", json.dumps(table)
