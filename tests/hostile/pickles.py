"""Hostile files of weights alone: Meta's .pt, a zip or an old pickle."""

from __future__ import annotations

import collections
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.conftest import meta_state
from tests.hostile.damage import Apply, Damage
from tests.hostile.manifests import ESCAPE, FORGED


class Trap:
    """Unpickled, it makes a file: the sign that code ran."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def changed(change: Callable[[dict], Any], legacy: bool = False) -> Apply:
    def apply(place: Path) -> None:
        state = meta_state()
        made = change(state)
        torch.save(state if made is None else made, place, _use_new_zipfile_serialization=not legacy)

    return apply


def pickles() -> Iterator[Damage]:
    deep: Any = ()
    for _ in range(60):  # shown in full it has 2^60 parts
        deep = (deep, deep)
    whole = "x_embedder.proj.weight"
    cases: dict[str, Callable[[dict], Any]] = {
        "a number": lambda state: 7,
        "a list": lambda state: [*state.values()],
        "code": lambda state: state | {"x": Trap()},
        "a name that is a number": lambda state: state | {7: torch.zeros(1)},
        "a value of 2^60 parts": lambda state: state | {"x": deep},
        "an ordered table of 2^60 parts": lambda state: collections.OrderedDict(state | {"x": deep}),
        "a tensor that repeats": lambda state: state.update(
            {whole: torch.zeros(1).expand(1 << 20, 4, 1 << 10, 1 << 10)}
        ),
        "a table that repeats": lambda state: state.update({"pos_embed": torch.zeros(1).expand(1, 1 << 30, 64)}),
        "classes that repeat": lambda state: state.update(
            {"y_embedder.embedding_table.weight": torch.zeros(1).expand(1 << 30, 64)}
        ),
        "a sparse tensor": lambda state: state.update(
            {whole: torch.sparse_coo_tensor([[0], [0], [0], [0]], [1.0], (1 << 20, 4, 2, 2))}
        ),
        "a meta tensor": lambda state: state.update({whole: torch.empty(1 << 30, 4, 2, 2, device="meta")}),
        "integers": lambda state: state.update({whole: state[whole].to(torch.int64)}),
        "complex numbers": lambda state: state.update({whole: state[whole].to(torch.complex64)}),
        "one dimension": lambda state: state.update({whole: state[whole].flatten()}),
        "no dimension": lambda state: state.update({whole: torch.tensor(1.0)}),
        "no numbers": lambda state: state.update({whole: torch.zeros(0, 4, 2, 2)}),
        "no patch": lambda state: state.update({whole: torch.zeros(64, 4, 0, 0)}),
        "no width": lambda state: state.update({"blocks.0.mlp.fc1.weight": torch.zeros(0, 64)}),
        "100,000 blocks": lambda state: state.update({f"blocks.{n}.x": torch.zeros(1) for n in range(100_000)}),
        "a block of 10^30": lambda state: state.update({f"blocks.{10**30}.x": torch.zeros(1)}),
        "NaN": lambda state: state.update({whole: torch.full_like(state[whole], float("nan"))}),
        "names that a terminal obeys": lambda state: state.update({ESCAPE + FORGED: torch.zeros(1)}),
        "nothing": lambda state: {},
        "nothing under ema": lambda state: {"ema": {}},
    }
    for name, change in cases.items():
        yield Damage(f"pt: {name}", changed(change), "refused", "meta")
        if name in ("code", "a number", "NaN", "a tensor that repeats"):
            yield Damage(f"pt: {name}, in the old format", changed(change, legacy=True), "refused", "meta")
    for share in (0.0, 0.01, 0.5, 0.99):
        yield Damage(
            f"pt: {share} of it",
            lambda place, share=share: os.truncate(place, int(share * place.stat().st_size)),
            "refused",
            "meta",
        )
    doubled = b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 60  # a tuple of 2^60 parts
    contents = {
        "text": b"hello",
        "a pickle of many lists": b"\x80\x02" + b"]" * 1_000_000 + b".",
        "a pickle without an end": b"\x80\x02}q\0" * 1000,
        "a text of 2^40 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40),
        "a memo of 2^31": b"\x80\x02]r" + struct.pack("<I", 2**31) + b".",
        "a key of 2^60 parts": doubled + b"}h\0K\x01s.",
        "a set of 2^60 parts": doubled + b"c__builtin__\nset\n]h\0a\x85R.",
        "a function of 2^60 parts": doubled + b")R.",
        "a class of 2^60 parts": doubled + b")\x81.",
        "a list as a function": b"\x80\x02])R.",
        "a key of a million tuples in each other": b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.",
        "an empty zip": b"PK\5\6" + bytes(18),
    }
    for name, content in contents.items():
        yield Damage(f"pt: {name}", lambda place, content=content: place.write_bytes(content), "refused", "meta")
    yield Damage("pt: a pipe", lambda place: (place.unlink(), os.mkfifo(place)), "refused", "meta")
    yield Damage("pt: a zip that unpacks to 400 MB", _bomb, "refused", "meta")
    yield Damage("pt: as it was", lambda place: None, "fine", "meta")


def _bomb(place: Path) -> None:
    with zipfile.ZipFile(place) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, bytes(400_000_000) if name.endswith("/data/0") else content)
