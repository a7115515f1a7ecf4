"""Find the files that an ONNX graph reads weights from, in its protobuf; the runtime has no onnx package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dit_runtime.errors import BundleError

if TYPE_CHECKING:
    from mmap import mmap

Span = tuple[int, int]  # of a message: its first byte and the one after its last
# Message -> its fields that can hold tensors, and of what message they are (onnx.proto3).
FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
KEY, VALUE = 1, 2  # of an entry
DEEPEST = 64  # messages in each other
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


def locations(path: Path) -> set[str]:
    """Return what the graph's tensors say under `location`."""
    import mmap  # so that weights inside of the file are not read

    size = path.stat().st_size
    if not size:
        return set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return set(_locations(content, (0, size), "model", 0))
        except (IndexError, ValueError) as error:
            raise BundleError(f"{path}: not an ONNX graph: {error}") from None


def _locations(content: mmap, span: Span, kind: str, depth: int) -> Iterator[str]:
    if depth > DEEPEST:
        raise ValueError(f"graphs are in each other more than {DEEPEST} deep")
    if kind == "entry":
        pair = {number: content[slice(*part)] for number, part in _fields(content, span) if number in (KEY, VALUE)}
        if pair.get(KEY) == b"location":
            yield pair.get(VALUE, b"").decode()
        return
    for number, part in _fields(content, span):
        if number in FIELDS[kind]:
            yield from _locations(content, part, FIELDS[kind][number], depth + 1)


def _fields(content: mmap, span: Span) -> Iterator[tuple[int, Span]]:
    """Yield number and place of each field that is a message, a text or bytes."""
    at, end = span
    while at < end:
        tag, at = _varint(content, at)
        kind = tag & 7
        if kind == VARINT:
            _, at = _varint(content, at)
            continue
        length = {FIXED64: 8, FIXED32: 4}.get(kind)
        if length is None:
            if kind != BYTES:
                raise ValueError(f"wire type {kind}")
            length, at = _varint(content, at)
        if length > end - at:
            raise ValueError("it ends too early")
        if kind == BYTES:
            yield tag >> 3, (at, at + length)
        at += length


def _varint(content: mmap, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")
