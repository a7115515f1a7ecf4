"""The user's cache: what backends compiled on this machine, a folder a bundle, checked before use and bounded."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dit_runtime.bundle.records import Manifest
from dit_runtime.facts import LIMITS
from dit_runtime.files import beside

SUM = 32  # bytes before an entry's content
SHARED = stat.S_IWGRP | stat.S_IWOTH


class Entry(NamedTuple):
    path: Path
    size: int
    used: float  # seconds since 1970


def root() -> Path | None:
    """Return the cache's folder, None for a user without a home."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(home) / "dit-run"


def folder_of(contract: Manifest) -> Path | None:
    """Return the folder of what is compiled of a bundle."""
    content = "".join(f"{name} {file.sha256}\n" for name, file in sorted(contract.files.items()))
    own = root()
    return own / _sum(content.encode(errors="backslashreplace")).hex()[:32] if own else None


def _sum(content: bytes) -> bytes:
    import hashlib  # here, so that importing the runtime stays quick

    return hashlib.sha256(content).digest()


def is_own(path: Path) -> bool:
    """Return whether a folder or file is the user's, is no link, and nobody else may write it."""
    status = path.lstat()
    known = stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)
    return known and (os.name == "nt" or (status.st_uid == os.geteuid() and not status.st_mode & SHARED))


def read(path: Path) -> bytes | None:
    """Return an entry, and note its use; None where there is none, it is damaged, or it is not the user's own."""
    with suppress(OSError):
        if all(is_own(part) for part in (path, path.parent, path.parent.parent)):
            content = path.read_bytes()
            if _sum(content[SUM:]) == content[:SUM]:
                os.utime(path)
                return content[SUM:]
    return None


def write(path: Path, content: bytes) -> None:
    """Keep an entry, and remove the ones that were used least recently where all take more than the limit.

    Where that fails nothing is kept: it only saves time.
    """
    with suppress(OSError):
        for part in (path.parent.parent, path.parent):
            part.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not is_own(part):
                return
        with beside(path, follow=False) as partial:
            partial.write_bytes(_sum(content) + content)
        prune(path.parent.parent)


def entries(own: Path) -> Iterator[Entry]:
    for path in own.glob("*/*"):
        with suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                yield Entry(path, status.st_size, status.st_mtime)


def prune(own: Path, most: int | None = None) -> list[Entry]:
    """Remove entries, the one whose use is longest ago first, until the rest takes at most so many bytes."""
    known = sorted(entries(own), key=lambda entry: entry.used)
    most = LIMITS["cache_bytes"] if most is None else most
    excess, removed = sum(entry.size for entry in known) - most, []
    for entry in known:
        if excess <= 0:
            break
        with suppress(OSError):
            entry.path.unlink()
            removed.append(entry)
            excess -= entry.size
    for folder in {entry.path.parent for entry in removed}:
        with suppress(OSError):  # others are in it
            folder.rmdir()
    return removed
