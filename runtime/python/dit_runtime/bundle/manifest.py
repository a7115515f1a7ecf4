"""The bundle's contract: manifest.json, what it may say, and the checks before anything it names is opened."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from numpy.typing import NDArray

from dit_runtime.bundle import signature
from dit_runtime.bundle.external import locations
from dit_runtime.bundle.parsing import parse
from dit_runtime.bundle.records import FORMAT, File, Guidance, Manifest, Port, Prompt, Stage, TensorSpec
from dit_runtime.errors import BundleError, UsageError
from dit_runtime.facts import LIMITS
from dit_runtime.files import as_text, parse_json, read_bytes, write_file
from dit_runtime.npy import read_npz

NAME = "manifest.json"
ENGINE = ".engine"  # what a file that a backend has compiled ends in
GRAPH, ARRAYS = ".onnx", ".npz"
State = tuple[int, ...]  # of a file
BUILT = {"version": str, "cuda": int, "compute_capabilities": list, "tuning": dict}  # of an engine

__all__ = ["FORMAT", "File", "Guidance", "Manifest", "Port", "Prompt", "Stage", "TensorSpec"]  # and the functions below


def read(folder: Path, engines: bool = True, sum256: str = "", public_key: bytes | None = None) -> Manifest:
    """Parse and check the manifest, and that each file it names is there in its size; open none of them.

    Without `engines`, those may be missing or damaged: they are to be made again, or given up (`lost_engines`).
    `sum256` is the sha256 that the manifest must have; empty: any. `public_key` is the key that must have signed it.
    """
    path, content = folder / NAME, read_content(folder)
    _require_sum(path, content, sum256)
    if public_key is not None:
        signature.require_signed(folder, content, public_key)
    try:
        table = parse_json(as_text(content, path), str(path))
    except UsageError as error:
        raise BundleError(str(error)) from None
    if not isinstance(table, dict) or not isinstance(table.get("format"), int):
        raise BundleError(f"{path}: no format number; expected {FORMAT}")
    if table["format"] != FORMAT:
        advice = "upgrade dit-export" if table["format"] > FORMAT else "rebuild it with `dit-export build`"
        raise BundleError(f"{path}: format {table['format']}, expected {FORMAT}: {advice}")
    try:
        manifest = parse(table)
    except (ValueError, BundleError) as error:
        raise BundleError(f"{path}: {error}") from None
    for name in manifest.files:
        inside(folder, name)
    _require(folder, manifest, [name for name in manifest.files if engines or not name.endswith(ENGINE)])
    return manifest


def read_content(folder: Path) -> bytes:
    """Return the manifest as its file has it."""
    path = folder / NAME
    if not path.is_file() or path.is_symlink():
        raise BundleError(f"{folder}: no {NAME} here; expected a bundle, as `dit-export build` writes it")
    try:
        return read_bytes(path, LIMITS["manifest_bytes"])
    except UsageError as error:
        raise BundleError(str(error)) from None


def _require_sum(path: Path, content: bytes, expected: str) -> None:
    import hashlib  # here, so that importing the runtime stays quick

    if expected and (own := hashlib.sha256(content).hexdigest()) != expected.lower():
        what = "this is another bundle than the one that was asked for"
        raise BundleError(f"{path}: its sha256 is {own}, expected {expected}; {what}")


def _require(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    for name in names:
        location, size = inside(folder, name), manifest.files[name].size
        if not location.is_file():
            raise BundleError(f"{folder}: {name} is missing; rebuild the bundle")
        if location.stat().st_size != size:
            raise BundleError(f"{folder}: {name} has {location.stat().st_size} bytes, expected {size}; rebuild it")


def lost_engines(folder: Path, manifest: Manifest) -> set[str]:
    """Return the engines that are missing, or not of their size."""
    engines = {name: inside(folder, name) for name in manifest.files if name.endswith(ENGINE)}
    return {
        name for name, path in engines.items() if not path.is_file() or path.stat().st_size != manifest.files[name].size
    }


def built(manifest: Manifest, stage: Stage) -> Mapping[str, Any]:
    """Return with what and for what a stage's engine was built; empty where the backend opens the ONNX form."""
    table: Any = manifest.built_with
    for key in ("engines", stage.backend, stage.name):
        table = table.get(key, {}) if isinstance(table, Mapping) else None
    if not isinstance(table, Mapping) or any(type(table[key]) is not BUILT[key] for key in table.keys() & BUILT):
        raise BundleError(f"{NAME}: built_with says {table!r} of {stage.name}'s engine; expected {', '.join(BUILT)}")
    return table


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file of the bundle; nothing may lead out of the folder."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in name or ":" in name:
        raise BundleError(f"{folder}: file name {name!r} leaves the bundle; refused")
    path = folder
    for part in pure.parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{folder}: {name!r} is a link; refused")
    return path


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare sha256 sums, of large files at the same time."""
    with checking(folder, manifest, names):
        pass


@contextmanager
def checking(
    folder: Path, manifest: Manifest, names: Iterable[str], checked: dict[str, State] | None = None
) -> Iterator[None]:
    """Compare sha256 sums while the body opens the files; a wrong sum is the error, whatever the body made of the file.

    Engines are executable, so theirs are compared before the body. Graphs name other files, so those must be among
    `names`. A file that is written or replaced meanwhile is refused. `checked` has the states of files whose sums were
    right before, and gets these.
    """
    from concurrent.futures import ThreadPoolExecutor  # here, so that importing the runtime stays quick

    names = list(names)
    if unknown := [name for name in names if name not in manifest.files]:
        raise BundleError(f"{folder}: {unknown[0]} is not in the manifest")
    _require(folder, manifest, names)
    for name in names:
        if name.endswith(ARRAYS) and manifest.files[name].size > LIMITS["reference_bytes"]:
            raise BundleError(f"{folder}: {name} has more than {LIMITS['reference_bytes']} bytes")
    states, checked = {name: state(inside(folder, name)) for name in names}, {} if checked is None else checked
    with ThreadPoolExecutor() as pool:
        changed = [name for name in names if checked.get(name) != states[name]]
        sums = {name: pool.submit(sha256, inside(folder, name)) for name in changed}

        def compare(names: Iterable[str]) -> None:
            for name in names:
                if name in sums and sums[name].result() != manifest.files[name].sha256:
                    advice = "it is damaged: rebuild it"
                    raise BundleError(f"{folder}: {name} does not have the sha256 of its manifest; {advice}")
                if state(inside(folder, name)) != states[name]:
                    raise BundleError(f"{folder}: {name} was changed while it was opened; try again")

        compare(name for name in names if name.endswith(ENGINE))
        try:
            for name in names:
                if name.endswith(GRAPH):
                    _require_listed(folder, name, names)
            yield
        finally:
            compare(names)
    checked |= states


def _require_listed(folder: Path, graph: str, names: Collection[str]) -> None:
    """Refuse a graph that reads files whose sums are not compared with its own."""
    place = PurePosixPath(graph).parent
    for location in locations(inside(folder, graph)):
        # With a star in it, engines read a place of their memory and not the file.
        if str(place / location) not in names or "*" in location:
            raise BundleError(f"{folder}: {graph} reads {location!r}, which is no file of its stage; refused")


def state(path: Path) -> State:
    """Return numbers that change when a file is written, or another is put in its place."""
    status = path.stat(follow_symlinks=False)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def sha256(path: Path) -> str:
    import hashlib  # here, so that importing the runtime stays quick

    with open(path, "rb", opener=_no_link) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def read_arrays(folder: Path, name: str) -> dict[str, NDArray[Any]]:
    """Return the arrays of one of the bundle's .npz files."""
    return read_npz(inside(folder, name), most=LIMITS["reference_bytes"])


def describe_files(folder: Path, skip: Collection[str] = ()) -> dict[str, File]:
    """Return size and sha256 of everything in the folder but the manifest and what is skipped."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: describe(path) for name, path in files.items() if name != NAME and name not in skip}


def describe(path: Path) -> File:
    return File(path.stat().st_size, sha256(path))


def write(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step; a signature of the old one is then of another manifest, and is refused."""
    write_file(folder / NAME, manifest.to_json(), follow=False)
