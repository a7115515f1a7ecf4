"""Coverage-guided fuzzing of what reads files: `python -m tests.hostile.fuzz TARGET CORPUS [libFuzzer's options]`.

A reader may refuse its input with the errors that it states; any other exception, ten seconds or a gigabyte is a find.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dit_runtime"]):
    from dit_runtime.bundle.external import locations
    from dit_runtime.bundle.manifest import Manifest
    from dit_runtime.bundle.parsing import parse
    from dit_runtime.errors import UsageError
    from dit_runtime.facts import LIMITS
    from dit_runtime.files import parse_json
    from dit_runtime.npy import read_npy, read_npz

FILE = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / "input"


def manifest(content: bytes) -> None:
    table = parse_json(content.decode(errors="replace"), "input")
    if isinstance(table, dict):
        contract = parse(table)
        assert isinstance(contract, Manifest) and parse(parse_json(contract.to_json(), "again")) == contract


def npz(content: bytes) -> None:
    FILE.write_bytes(content)
    arrays = read_npz(FILE, most=LIMITS["reference_bytes"])
    assert sum(array.nbytes for array in arrays.values()) <= len(content)


def npy(content: bytes) -> None:
    FILE.write_bytes(content)
    assert read_npy(FILE).nbytes <= len(content)


def graph(content: bytes) -> None:
    FILE.write_bytes(content)
    locations(FILE)


TARGETS: dict[str, Callable[[bytes], None]] = {"manifest": manifest, "npz": npz, "npy": npy, "graph": graph}


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]

    def once(content: bytes) -> None:
        try:
            target(content)
        except (UsageError, ValueError):  # parse's refusals are ValueError
            return

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
