"""Hostile reference.npz: archives that unpack to more than they are, and numbers that no run has."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile import Damage
from tests.hostile.files import cut, sealed, written
from tests.hostile.manifests import ESCAPE
from tests.tamper import seal

NAME = "reference.npz"
Apply = Callable[[Path], object]


def arrays(change: Callable[[dict[str, Any]], object]) -> Apply:
    def apply(folder: Path) -> None:
        content = dict(np.load(folder / NAME))
        change(content)
        np.savez(folder / NAME, **content)
        seal(folder)

    return apply


def setting(name: str, make: Callable[[np.ndarray], Any]) -> Apply:
    return arrays(lambda content: content.__setitem__(name, make(content[name])))


def npy(header: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text + data


def member(content: bytes, name: str = "timesteps") -> Apply:
    """An array's file is these bytes."""

    def apply(folder: Path) -> None:
        with zipfile.ZipFile(folder / NAME) as archive:
            parts = {info.filename: archive.read(info) for info in archive.infolist()}
        parts[f"{name}.npy"] = content
        with zipfile.ZipFile(folder / NAME, "w") as archive:
            for own, part in parts.items():
                archive.writestr(own, part)

    return sealed(apply)


def edited(change: Callable[[bytearray], object]) -> Apply:
    """The archive's own bytes are others."""

    def apply(folder: Path) -> None:
        content = bytearray((folder / NAME).read_bytes())
        change(content)
        (folder / NAME).write_bytes(content)

    return sealed(apply)


def bomb(folder: Path) -> None:
    """400 MB of zeros in 400 kB."""
    with (
        zipfile.ZipFile(folder / NAME, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("latents.npy", "w", force_zip64=True) as file,
    ):
        file.write(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (100000000,), }"))
        for _ in range(400):
            file.write(bytes(1_000_000))


def overlapping(folder: Path) -> None:
    """A thousand members share the bytes of one."""
    data = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1048576,), }", bytes(1 << 22))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", data)
    content = bytearray(file.getvalue())
    start = content.index(b"PK\1\2")
    directory, end = bytes(content[start:-22]), bytearray(content[-22:])
    many = b"".join(directory[:46] + f"{number:05}"[:5].encode() + directory[51:] for number in range(1000))
    struct.pack_into("<HHI", end, 8, 1000, 1000, len(many))
    (folder / NAME).write_bytes(bytes(content[:start]) + many + bytes(end))


def duplicated(folder: Path) -> None:
    import warnings

    with zipfile.ZipFile(folder / NAME) as archive:
        parts = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(folder / NAME, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for own, part in [*parts, parts[0]]:
            archive.writestr(own, part)


def compressed(folder: Path) -> None:
    np.savez_compressed(folder / NAME, **dict(np.load(folder / NAME)))


def many(folder: Path) -> None:
    np.savez(folder / NAME, **dict(np.load(folder / NAME)), **{f"x{number}": np.zeros(1) for number in range(20_000)})


def archives() -> Iterator[Damage]:
    for name, content in {
        "nothing": b"",
        "the start of a zip": b"PK\3\4",
        "text": b"hello",
        "an end alone": _end(0, 0),
    }.items():
        yield Damage(f"archive: {name}", written(content, NAME), "verify")
    for share in (0.1, 0.5, 0.99):
        yield Damage(f"archive: {share} of it", cut(share, NAME), "verify")
    yield Damage("archive: a bomb", sealed(bomb), "verify")
    yield Damage("archive: members that overlap", sealed(overlapping), "verify")
    yield Damage("archive: a name twice", sealed(duplicated), "verify")
    yield Damage("archive: compressed", sealed(compressed), "verify")
    yield Damage("archive: 20,000 arrays more", sealed(many), "survives")
    yield Damage(
        "archive: a directory of 4 GB",
        edited(lambda content: struct.pack_into("<I", content, len(content) - 10, 2**32 - 1)),
        "verify",
    )
    yield Damage(
        "archive: a directory elsewhere",
        edited(lambda content: struct.pack_into("<I", content, len(content) - 6, 12)),
        "verify",
    )
    yield Damage(
        "archive: 65,535 entries",
        edited(lambda content: struct.pack_into("<HH", content, len(content) - 14, 65535, 65535)),
        "survives",
    )
    yield Damage("archive: locked", edited(_locked), "verify")
    yield Damage("archive: a directory that is too long", edited(_longer), "verify")  # the fuzzer's: a member before 0
    yield Damage("archive: a checksum", edited(_checksum), "verify")
    yield Damage(
        "archive: a name that leaves", arrays(lambda content: content.update({"../../evil": np.zeros(2)})), "fine"
    )
    yield Damage("archive: a name that a terminal obeys", member(b"x", ESCAPE.replace("/", "")), "verify")


def _end(entries: int, size: int) -> bytes:
    return struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, entries, entries, size, 0, 0)


def _locked(content: bytearray) -> None:
    place = content.index(b"PK\1\2")
    content[place + 8] |= 1


def _longer(content: bytearray) -> None:
    (size,) = struct.unpack_from("<I", content, len(content) - 10)
    struct.pack_into("<I", content, len(content) - 10, size + 100)
    struct.pack_into("<I", content, len(content) - 6, len(content) - size)


def _checksum(content: bytearray) -> None:
    content[content.index(b"\x93NUMPY") + 200] ^= 1


def headers() -> Iterator[Damage]:
    good = "{'descr': '<f8', 'fortran_order': False, 'shape': (4,), }"
    numbers = np.array([750.0, 500.0, 250.0, 0.0]).tobytes()
    contents = {
        "no array": b"hello",
        "nothing": b"",
        "half a header": b"\x93NUMPY\1\0\1\0{",
        "an unknown version": npy(good, numbers, b"\x09\0"),
        "a shape of 10^12": npy(good.replace("(4,)", "(1000000000000,)"), numbers),
        "a shape of 2^64": npy(good.replace("(4,)", f"({1 << 64},)"), numbers),
        "a shape whose product is 0 by overflow": npy(good.replace("(4,)", f"({1 << 32}, {1 << 32})"), numbers),
        "a negative shape": npy(good.replace("(4,)", "(-4,)"), numbers),
        "two negative sizes": npy(good.replace("(4,)", "(-2, -2)"), numbers),
        "a shape of 100 axes": npy(good.replace("(4,)", "(" + "1," * 100 + "4)"), numbers),
        "fewer bytes": npy(good, numbers[:-1]),
        "more bytes": npy(good, numbers + b"\0"),
        "a type of objects": npy(good.replace("<f8", "|O"), numbers),
        "a type of 10^9 bytes": npy(good.replace("<f8", "|V1000000000"), numbers),
        "a type of code": npy(
            "{'descr': __import__('os').system('touch evil'), 'fortran_order': False, 'shape': (4,), }", numbers
        ),
        "a type of records": npy(
            "{'descr': [('a', '<f4'), ('b', '<f4')], 'fortran_order': False, 'shape': (4,), }", numbers
        ),
        "a type that a terminal obeys": npy(good.replace("<f8", "\\x1b[2J"), numbers),
        "a header of 20,000 lists": npy("[" * 20_000, numbers),
        "a long header": npy(good + " " * 60_000, numbers),
        "big-endian": npy(good.replace("<", ">"), np.array([750.0, 500.0, 250.0, 0.0], ">f8").tobytes()),
        "Fortran's order": npy(good.replace("False", "True"), numbers),
        "a pickle": b"\x80\x04\x95\x00\x00\x00\x00",
    }
    for name, content in contents.items():
        yield Damage(f"header: {name}", member(content), "verify")


def numbers() -> Iterator[Damage]:
    for name in (
        "timesteps",
        "guidance",
        "latents",
        "prediction",
        "conditional",
        "null",
        "variance",
        "fingerprint",
        "betas",
    ):
        for value in (np.nan, np.inf, -np.inf):
            yield Damage(f"numbers: {value} in {name}", setting(name, _with(value)), "verify")
    for value in (1e300, -1.0, 1e9):
        yield Damage(f"numbers: a timestep of {value}", setting("timesteps", _with(value)), "verify")
    for value in (1e9, 1 << 40, -1, 6):
        yield Damage(f"numbers: a label of {value}", setting("condition.labels", _with(value)), "verify")
    yield Damage("numbers: labels that are floats", setting("condition.labels", lambda array: array + 0.5), "verify")
    yield Damage("numbers: labels of the largest integer", setting("condition.labels", _with(2**63 - 1)), "verify")
    yield Damage("numbers: 2,000,000 timesteps", setting("timesteps", lambda array: np.zeros(2_000_000)), "verify")
    yield Damage("numbers: 2,000,000 seeds", setting("seeds", lambda array: np.zeros(2_000_000, np.int64)), "verify")
    yield Damage("numbers: 2,000 steps of everything", arrays(_long), "verify")
    yield Damage("numbers: no steps", setting("timesteps", lambda array: array[:0]), "verify")
    yield Damage("numbers: no pictures", setting("images", lambda array: array[:0]), "verify")
    yield Damage("numbers: frames of a picture", arrays(lambda content: content.update(frames=np.array([0]))), "verify")
    yield Damage("numbers: a seed more", setting("seeds", lambda array: np.array([*array, 1])), "verify")
    yield Damage(
        "numbers: seeds of the ends of int64", setting("seeds", lambda array: np.array([2**63 - 1, -(2**63)])), "fails"
    )
    yield Damage(
        "numbers: a guidance of 1e38", setting("guidance", lambda array: np.full(2, 1e38, np.float32)), "fails"
    )
    yield Damage("numbers: another prediction", setting("prediction", lambda array: array + 1), "fails")
    yield Damage(
        "numbers: predictions of 1e38", setting("prediction", lambda array: np.full_like(array, 1e38)), "fails"
    )
    yield Damage("numbers: complex", setting("latents", lambda array: array.astype(np.complex64)), "verify")
    yield Damage("numbers: texts", setting("latents", lambda array: array.astype("U")), "verify")
    for name in (
        "betas",
        "timesteps",
        "seeds",
        "guidance",
        "latents",
        "variance",
        "condition.labels",
        "null.labels",
        "images",
    ):
        yield Damage(f"numbers: without {name}", arrays(lambda content, name=name: content.pop(name)), "verify")
        yield Damage(f"numbers: another axis of {name}", setting(name, lambda array: array[None]), "verify")


def _with(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        changed = array.copy() if array.dtype.kind == "f" else array.astype(np.int64)
        changed.flat[0] = value
        return changed

    return change


def _long(content: dict[str, Any]) -> None:
    for name in ("timesteps", "prediction", "conditional", "null", "variance"):
        content[name] = np.repeat(content[name], 500, axis=0)
    content["latents"] = np.repeat(content["latents"][:1], 2001, axis=0)


REFERENCES = (*archives(), *headers(), *numbers())
