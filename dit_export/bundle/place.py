"""The places of a build: room on the disk, a folder beside the destination, and the destination itself."""

from __future__ import annotations

import ctypes
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from dit_runtime.files import PARTIAL, sync

if TYPE_CHECKING:
    from dit_export.checkpoints import Loaded

OLD = ".old-"  # in the name of a bundle that is being replaced, where the system cannot exchange two folders
HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


class DiskFull(UsageError):
    """A disk without room for what comes next."""


def require_disk(partial: Path, loaded: Loaded, copies: int) -> None:
    """Refuse a disk without room for `copies` of the weights: two are the traced graph and the bundle's own.

    A typed bundle has its fp32 form and its engine as well.
    """
    modules = [loaded.network.module] + ([loaded.vae.decoder] if loaded.vae is not None else [])
    modules += [loaded.text.module] if loaded.text is not None else []
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    needed, free = copies * weights + (64 << 20), shutil.disk_usage(partial).free
    if free < needed:
        raise DiskFull(f"{partial.parent}: {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB for this build")


def refuse_foreign(folder: Path) -> None:
    if folder.exists() and not (folder / manifest.NAME).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is no bundle; refusing to replace it: choose another -o")


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """Make a folder beside the destination, gone whatever happens; the destination is only ever a whole bundle.

    What killed builds of the same destination left is removed first.
    """
    refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    work = folder.parent / f".{folder.name}{PARTIAL}{secrets.token_hex(4)}"
    work.mkdir()  # no pid in its name: in containers pids return
    let_go = _hold(work)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if let_go is not None:
            let_go()


def put_in_place(partial: Path, folder: Path, passed: bool) -> Path:
    """Rename the folder; a bundle that failed goes to FOLDER.failed, to be looked at, and replaces nothing."""
    if not passed:
        folder = folder.with_name(folder.name + ".failed")
        refuse_foreign(folder)
    for path in (*partial.rglob("*"), partial):
        sync(path)
    if not folder.exists():
        partial.rename(folder)
    elif not _exchange(partial, folder):
        old = folder.parent / f".{folder.name}{OLD}{secrets.token_hex(4)}"
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    sync(folder.parent)
    return folder


def _exchange(partial: Path, folder: Path) -> bool:
    """Let two folders change their names at once, so that there is a whole one at any time; False where none can."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(partial.absolute()), os.fsencode(folder.absolute())
    return rename is not None and rename(HERE, names[0], HERE, names[1], EXCHANGE) == 0


def _hold(work: Path) -> Callable[[], None] | None:
    """Hold a folder, as a sign that its build lives, and return what lets go; None where another holds it.

    The system lets go when the process ends. Where it cannot hold folders, none is held and none is cleaned.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return lambda: os.close(descriptor)


def _clean(folder: Path) -> None:
    """Put back the bundle that a killed build had moved away, and remove the folders that no living build holds."""
    left = sorted(folder.parent.glob(f".{glob.escape(folder.name)}{OLD}*"))
    if left and not folder.exists():
        left.pop().rename(folder)
    for path in (*left, *folder.parent.glob(f".{glob.escape(folder.name)}{PARTIAL}*")):
        if let_go := _hold(path):
            shutil.rmtree(path, ignore_errors=True)
            let_go()
