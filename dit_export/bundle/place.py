"""The places of a build: room on the disk, a folder beside the destination, and the destination itself."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dit_export.checkpoints import Loaded
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError


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
    """Make a folder beside the destination, gone whatever happens; the destination is only ever a whole bundle."""
    refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    work.mkdir()  # no pid in its name: a killed build's stays, and in containers pids return
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put_in_place(partial: Path, folder: Path, passed: bool) -> Path:
    """Rename the folder; a bundle that failed goes to FOLDER.failed, to be looked at, and replaces nothing."""
    if not passed:
        folder = folder.with_name(folder.name + ".failed")
        refuse_foreign(folder)
    old = folder.parent / f".{folder.name}.old-{secrets.token_hex(4)}"
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder
