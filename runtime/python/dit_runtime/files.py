"""Arrays that users pass as NumPy's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.conditions.condition import Condition
from dit_runtime.errors import UsageError


def read_condition(values: Sequence[str], option: str) -> Condition | None:
    """Return the arrays of NAME=FILE.npy …, or of one FILE.npz, by port; None where there are none."""
    if not values:
        return None
    if len(values) == 1 and "=" not in values[0]:
        arrays = _load(Path(values[0]), ".npz")
        return {name: _numbers(array, f"{values[0]}: {name}") for name, array in arrays.items()}
    condition: dict[str, np.ndarray] = {}
    for value in values:
        name, sign, file = value.partition("=")
        if not (name and sign and file) or name in condition:
            raise UsageError(f"{option} {value!r}; expected NAME=FILE.npy, each name once, or one FILE.npz")
        condition[name] = read_array(Path(file))
    return condition


def read_array(path: Path) -> np.ndarray:
    return _numbers(_load(path, ".npy"), str(path))


def _load(path: Path, suffix: str) -> Any:
    try:
        loaded = np.load(path, allow_pickle=False)
        if suffix == ".npz":  # members are read, and may be damaged, when they are asked for
            members = {name: loaded[name] for name in loaded.files}
            loaded.close()
            return members
    except OSError:
        raise
    except Exception as error:  # what a damaged file raises shares no base class but this
        raise UsageError(f"{path}: not a {suffix} file of numbers: {error}") from None
    return loaded


def _numbers(array: Any, what: str) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise UsageError(f"{what}: not an array of numbers")
    return array
