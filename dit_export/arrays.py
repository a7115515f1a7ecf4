"""A user's .npy and .npz files as arrays by name."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

from numpy.lib.format import MAGIC_PREFIX
from numpy.typing import NDArray

from dit_runtime.errors import UsageError
from dit_runtime.files import open_file
from dit_runtime.npy import read_npy, read_npz


def read_arrays(path: Path, what: str, alone: Set[str] = frozenset()) -> dict[str, NDArray[Any]]:
    """Read a file's arrays by name; the array of an .npy file has an empty name. Where the file holds all of `alone`,
    read only those."""
    try:
        with open_file(path) as file:
            single = file.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; expected {what}") from None
    if single:
        return {"": read_npy(path, what)}
    arrays = read_npz(path, what, alone=alone) if alone else {}
    return arrays if alone and arrays.keys() == alone else read_npz(path, what)
