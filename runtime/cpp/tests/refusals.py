"""List of manifest changes that Python refuses: `refusals.py BUNDLE FILE.json [PLACE …]`. C++ must refuse them too.

With places, which are JSON pointers, only what is inside of them is changed.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_runtime import BundleError
from dit_runtime.bundle import manifest

# Of every kind that JSON has, and two names that are right elsewhere; REMOVED takes the entry out.
REMOVED = object()
ODD = (None, True, -1, 0, 1.5, 10**30, "", "x", "velocity", "heun", [], {}, [None], REMOVED)


def places(value: Any, path: str = "") -> Iterator[str]:
    """JSON pointers to everything that the value holds."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        here = f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}"
        yield here
        yield from places(inner, here)


def change(table: dict[str, Any], place: str, odd: Any) -> dict[str, Any]:
    changed = inner = copy.deepcopy(table)
    *outer, last = (key.replace("~1", "/").replace("~0", "~") for key in place.split("/")[1:])
    for key in outer:
        inner = inner[int(key) if isinstance(inner, list) else key]
    at: Any = int(last) if isinstance(inner, list) else last
    if odd is REMOVED:
        del inner[at]
    else:
        inner[at] = odd
    return changed


def refused(bundle: Path, within: tuple[str, ...] = ("",)) -> list[dict[str, Any]]:
    good = json.loads((bundle / manifest.NAME).read_text(encoding="utf-8"))
    refusals = []
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(shutil.copytree(bundle, Path(folder) / "bundle"))
        for place in filter(lambda place: place.startswith(within), places(good)):
            for odd in ODD:
                (copied / manifest.NAME).write_text(json.dumps(change(good, place, odd)), encoding="utf-8")
                try:
                    manifest.read(copied)
                except BundleError:
                    refusals.append({"place": place} | ({} if odd is REMOVED else {"value": odd}))
    return refusals


if __name__ == "__main__":
    refusals = refused(Path(sys.argv[1]), tuple(sys.argv[3:]) or ("",))
    Path(sys.argv[2]).write_text(json.dumps(refusals), encoding="utf-8")
