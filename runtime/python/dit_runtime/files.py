"""Text and JSON of users and of bundles, read up to a limit, and outputs that are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any, NoReturn

from dit_runtime.errors import UsageError
from dit_runtime.facts import LIMITS


def open_file(path: Path) -> IO[bytes]:
    """Open a file to read; refuse folders and pipes, which could be waited for."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: no file")
    return path.open("rb")


def read_json(path: Path, most: int = LIMITS["json_bytes"]) -> Any:
    """Return what a JSON file of at most so many bytes holds; a mark of the bytes' order may come first."""
    return parse_json(read_text(path, most), str(path))


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def read_text(path: Path, most: int = LIMITS["json_bytes"]) -> str:
    """Return the UTF-8 text of a file of at most so many bytes."""
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UsageError(f"{path}: more than {most} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not text in UTF-8: {error}") from None
