"""NumPy's files, read without trust: what a header declares must be what the file holds, before memory is taken."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dit_runtime.conditions.condition import Condition
from dit_runtime.errors import UsageError
from dit_runtime.facts import LIMITS
from dit_runtime.files import open_file

BUNDLE_DTYPES = ("<f2", "<f4", "<f8", "<i4", "<i8", "|u1", "|b1")  # of a bundle's files, which C++ reads too
HEADERS: dict[tuple[int, int], Callable[[Any], Any]] = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}
END, LOCATOR, ENTRY = 22, 20, 30  # bytes of a zip's end record, of zip64's locator before it, and of a local header


def read_npz(
    path: Path, what: str = "a .npz file of numbers", *, most: int | None = None, alone: Container[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Return an .npz file's arrays by name, or those in `alone`.

    With `most` bytes the file is a bundle's: stored as np.savez writes it, in BUNDLE_DTYPES. A user's may be
    compressed.
    """
    with open_file(path) as file:
        try:
            size = _size(file, most)
            _check_end(file, size)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                _check_members(members, size, stored=most is not None)
                names = [(member, member.filename.removesuffix(".npy")) for member in members]
                dtypes = BUNDLE_DTYPES if most is not None else None
                return {
                    name: _read(archive.open(member), member.file_size, f"{name}: ", dtypes)
                    for member, name in names
                    if alone is None or name in alone
                }
        except Exception as error:  # what a damaged file raises shares no base class but this
            raise UsageError(f"{path}: not {what}: {error}") from None


def read_npy(path: Path, what: str = "a .npy file of numbers") -> NDArray[Any]:
    """Return a user's array."""
    with open_file(path) as file:
        try:
            return _read(file, _size(file, None), "", None)
        except Exception as error:
            raise UsageError(f"{path}: not {what}: {error}") from None


def read_condition(values: Sequence[str], option: str) -> Condition | None:
    """Return the arrays of NAME=FILE.npy …, or of one FILE.npz, by port; None where there are none."""
    if not values:
        return None
    if len(values) == 1 and "=" not in values[0]:
        arrays = read_npz(Path(values[0]))
        return {name: _numbers(array, f"{values[0]}: {name}") for name, array in arrays.items()}
    condition: dict[str, np.ndarray] = {}
    for value in values:
        name, sign, file = value.partition("=")
        if not (name and sign and file) or name in condition:
            raise UsageError(f"{option} {value!r}; expected NAME=FILE.npy, each name once, or one FILE.npz")
        condition[name] = read_array(Path(file))
    return condition


def read_array(path: Path) -> np.ndarray:
    return _numbers(read_npy(path), str(path))


def _numbers(array: np.ndarray, what: str) -> np.ndarray:
    if array.dtype.kind == "U":
        raise UsageError(f"{what}: not an array of numbers")
    return array


def _size(file: IO[bytes], most: int | None) -> int:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if most is not None and size > most:
        raise ValueError(f"it has {size} bytes; expected at most {most}")
    return size


def _check_end(file: IO[bytes], size: int) -> None:
    """Refuse a zip file with too large a directory before zipfile reads it into memory."""
    tail = max(0, size - END - LOCATOR)
    file.seek(tail)
    end = file.read()[-END - LOCATOR :]
    if len(end) < END or end[-END:][:4] != b"PK\5\6" or end[:4] == b"PK\6\7":
        raise ValueError("it is no zip file, or has a comment, or more than 4 GB")
    (directory,) = struct.unpack("<I", end[-END:][12:16])
    if directory > LIMITS["directory_bytes"]:
        raise ValueError(f"its directory has {directory} bytes; expected at most {LIMITS['directory_bytes']}")


def _check_members(members: Sequence[zipfile.ZipInfo], size: int, stored: bool) -> None:
    """Refuse members that share a name or bytes, and more bytes than the file can be expected to unpack to."""
    if len({member.filename for member in members}) != len(members):
        raise ValueError("two of its members have one name")
    ordered = sorted(members, key=lambda member: member.header_offset)
    ends = [*(member.header_offset for member in ordered[1:]), size]
    for member, end in zip(ordered, ends, strict=True):
        if member.header_offset + ENTRY + member.compress_size > end:
            raise ValueError(f"{member.filename} overlaps what follows it")
        if stored and (member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size):
            raise ValueError(f"{member.filename} is compressed; expected what np.savez writes")
    total, most = sum(member.file_size for member in members), max(LIMITS["unpacked_bytes"], 8 * size)
    if total > most:
        raise ValueError(f"it unpacks to {total} bytes; expected at most {most}")


def _read(file: IO[bytes], size: int, where: str, dtypes: Container[str] | None) -> NDArray[Any]:
    """Read one array from a stream of so many bytes."""
    version = npy.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"{where}format {version} of .npy is not known")
    shape, fortran, dtype = HEADERS[version](file)
    if dtype.kind not in "fiubU" or (dtypes is not None and (dtype.str not in dtypes or fortran)):
        raise ValueError(f"{where}{dtype.str}{' in Fortran order' * fortran}, expected numbers")
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"{where}{[*shape]} of {dtype} in {size - file.tell()} bytes")
    array = np.empty(math.prod(shape), dtype)
    view = array.view(np.uint8).data
    done = 0
    while done < len(view):
        if not (count := file.readinto(view[done:])):  # type: ignore[attr-defined]
            raise ValueError("it ends too early")
        done += count
    if file.read(1):  # which also compares a member's checksum
        raise ValueError("it goes on after its end")
    return array.reshape(shape, order="F" if fortran else "C")
