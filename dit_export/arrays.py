"""A user's .npy and .npz files as arrays by name."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import UsageError


def read_arrays(path: Path, what: str, alone: Set[str] = frozenset()) -> dict[str, NDArray[Any]]:
    """Read a file's arrays by name; the array of an .npy file has an empty name. Where the file holds all of `alone`,
    read only those."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in (alone if alone and alone <= set(loaded) else loaded)}
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; expected {what}") from None
    except Exception as error:  # what a damaged file raises shares no base class but this
        raise UsageError(f"{path}: not {what}: {error}") from None
