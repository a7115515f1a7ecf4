"""Text and JSON of users and of bundles, read up to a limit, and outputs that are whole or not there."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from dit_runtime.errors import UsageError
from dit_runtime.facts import LIMITS


def open_file(path: Path) -> IO[bytes]:
    """Open a file to read; refuse folders and pipes, which could be waited for."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: no file")
    return path.open("rb")


def read_json(path: Path, most: int = LIMITS["json_bytes"], constants: bool = False) -> Any:
    """Return what a JSON file of at most so many bytes holds; a mark of the bytes' order may come first.

    The `constants` that Python writes and JSON does not have, such as -Infinity, are read only where that is wanted.
    """
    return parse_json(read_text(path, most), str(path), constants)


def parse_json(text: str, where: str, constants: bool = False) -> Any:
    try:
        return json.loads(text, parse_constant=None if constants else _refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def read_text(path: Path, most: int = LIMITS["json_bytes"]) -> str:
    """Return the UTF-8 text of a file of at most so many bytes."""
    return as_text(read_bytes(path, most), path)


def read_bytes(path: Path, most: int) -> bytes:
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UsageError(f"{path}: more than {most} bytes")
    return content


def as_text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not text in UTF-8: {error}") from None


PARTIAL = ".partial-"  # in the name of a file or folder that is not whole yet


@contextmanager
def beside(path: Path, follow: bool = True) -> Iterator[Path]:
    """Give the body another path to write; put the file in place, whole and synced, where the body ends, or remove it.

    A user's link is followed, and what is no file, such as /dev/stdout, is written itself; inside of a bundle neither.
    """
    place = Path(os.path.realpath(path)) if follow else path
    if follow and place.exists() and not place.is_file() and not place.is_dir():
        yield place
        return
    partial = place.with_name(f".{place.stem}{PARTIAL}{secrets.token_hex(4)}{place.suffix}")
    try:
        yield partial
        if place.is_file() and not place.is_symlink():
            partial.chmod(stat.S_IMODE(place.stat().st_mode))
        sync(partial)
        partial.replace(place)
    except BaseException:  # a full disk, or ctrl-c
        partial.unlink(missing_ok=True)
        raise
    sync(place.parent)


def write_file(path: Path, content: bytes | str, follow: bool = True) -> None:
    """Put a file in place in one step; text is UTF-8."""
    with beside(path, follow) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # which opens no folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
