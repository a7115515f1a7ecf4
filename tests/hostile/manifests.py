"""Hostile manifests: text that is no JSON, values of wrong kinds and sizes, names and paths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dit_runtime.facts import LIMITS
from tests.hostile import Damage
from tests.tamper import edit

NAME = "manifest.json"
Place = tuple[str | int, ...]
ESCAPE, BIDI = "\x1b[2J\x1b]0;owned\x07", "\u202egnp.exe"
FORGED = "x\ndit-run: error: all is well\r\x1b[1A"
PATHS = {
    "parent": "../outside",
    "parent inside": "a/../../outside",
    "absolute": "/etc/hostname",
    "windows": "..\\outside",
    "drive": "C:outside",
    "empty": "",
    "dot": ".",
    "parent alone": "..",
    "device": "/dev/zero",
    "proc": "/proc/self/environ",
    "stream": "denoiser.onnx:hidden",
    "nul": "denoiser\0.onnx",
    "long": "a" * 5000,
    "deep": "a/" * 2000 + "x",
    "missing": "nowhere.onnx",
    "escapes": ESCAPE,
}


def setting(*place: str | int, value: Any) -> Callable[[Path], None]:
    """Return what sets a value of the manifest; a callable value takes the one that is there."""

    def change(table: dict) -> None:
        inner: Any = table
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value(inner[place[-1]]) if callable(value) else value

    return lambda folder: edit(folder, change)


def text(content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / NAME).write_bytes(content if isinstance(content, bytes) else content.encode())


def replaced(old: str, new: str) -> Callable[[Path], object]:
    """Return what replaces text of the manifest, for what json.dumps does not write."""

    def apply(folder: Path) -> None:
        content = (folder / NAME).read_text()
        assert old in content
        (folder / NAME).write_text(content.replace(old, new, 1))

    return apply


def texts() -> Iterator[Damage]:
    contents: dict[str, str | bytes] = {
        "nothing": "",
        "a brace": "{",
        "a list": "[]",
        "null": "null",
        "a number": "7",
        "a text": '"a"',
        "a nul": "\0",
        "a mark and a table": "\ufeff{}",
        "the format alone": '{"format": 2}',
        "bytes that are no text": b"\xff\xfe\xfd",
        "UTF-16": '{"format": 2}'.encode("utf-16"),
        "100,000 lists in each other": "[" * 100_000,
        "100,000 tables in each other": '{"a":' * 100_000,
        "a number of 5,000 digits": '{"format": ' + "9" * 5000 + "}",
        "1e999": '{"format": 1e999}',
        "more than 4 MB": '{"format": 2, "model": {"x": "' + "a" * LIMITS["manifest_bytes"] + '"}}',
        "4 MB of lists": "[" + "[]," * 1_000_000 + "[]]",
        "4 MB of spaces": " " * LIMITS["manifest_bytes"],
        "an unfinished text": '{"format": 2, "model": "',
        "a half surrogate": '{"format": 2, "\\ud800": 1}',
        "escapes that a terminal obeys": json.dumps({"format": ESCAPE}),
    }
    for name, content in contents.items():
        yield Damage(f"text: {name}", text(content))
    yield Damage("text: another format", setting("format", value=3))
    yield Damage("text: format 1", setting("format", value=1))
    yield Damage("text: format true", setting("format", value=True))
    yield Damage("text: NaN", replaced('"channels": 2', '"channels": NaN'))
    yield Damage("text: Infinity", replaced('"beta_end": 0.02', '"beta_end": Infinity'))
    yield Damage("text: a comment", replaced("{", "{ // hello\n"))
    yield Damage("text: a comma too many", replaced('"null": {', '"null": {,'))
    sums = setting("files", "denoiser.onnx.data", "sha256", value="\ud800")
    yield Damage("text: a half surrogate as a sum", sums, "open")
    yield Damage("text: a half surrogate as a class", setting("labels", 0, value="\ud800"), "survives")
    yield Damage(
        "text: a mark before it", lambda folder: text(b"\xef\xbb\xbf" + (folder / NAME).read_bytes())(folder), "fine"
    )


def counts() -> Iterator[Damage]:
    many = 300_000

    def times(count: int) -> Callable[[list], list]:
        return lambda entries: [dict(entries[0], name=f"n{number}") for number in range(count)]

    for key in ("ports", "stages"):
        yield Damage(f"counts: {key} over the limit", setting(key, value=times(LIMITS[key] + 1)))
        yield Damage(f"counts: no {key}", setting(key, value=[]))
        yield Damage(f"counts: {key} twice", setting(key, value=lambda entries: [*entries, entries[0]]))
    for key in ("reads", "gives"):
        yield Damage(f"counts: {key} over the limit", setting("stages", 1, key, value=times(LIMITS[key] + 1)))
    yield Damage(
        "counts: presets over the limit", setting("presets", value={str(n): {} for n in range(LIMITS["presets"] + 1)})
    )
    yield Damage("counts: 300,000 labels", setting("labels", value=["x"] * many))
    yield Damage("counts: 300,000 shared files", setting("stages", 1, "shared", value=["x"] * many))
    yield Damage("counts: 300,000 engines", setting("stages", 1, "engines", value={"onnxruntime": ["x"] * many}))
    yield Damage(
        "counts: 300,000 backends", setting("stages", 1, "engines", value={str(n): ["x"] for n in range(many)})
    )
    yield Damage("counts: 1,000,000 axes", setting("ports", 0, "shape", value=[1] * 1_000_000))
    yield Damage("counts: 1,000,000 betas", setting("process", "trained_betas", value=[0.5] * 1_000_000))
    yield Damage("counts: files over the limit", _many_files)
    yield Damage("counts: 65,537 classes", setting("ports", 2, "size", value=LIMITS["classes"] + 2))
    for name, size in {"1 TB": 1 << 40, "10^30": 10**30, "-1": -1, "true": True, "1.0": 1.0}.items():
        yield Damage(f"counts: a file of {name} bytes", setting("files", "reference.npz", "size", value=size))
    for number in (0, -1, 1 << 25, 1 << 31, 1 << 63, 1 << 64, 10**30, -(10**30), 1e300, 0.5):
        for place in ((0, "shape", 1), (2, "size")):
            where = f"ports {place}"
            yield Damage(f"counts: {where} is {number}", setting("ports", *place, value=number))
        for key in ("train_steps", "beta_end"):
            value = number + (key == "beta_end")
            yield Damage(f"counts: {key} is {value}", setting("process", key, value=value))
        if number != 0.5:
            yield Damage(f"counts: max_batch is {number}", setting("stages", 1, "max_batch", value=number))
        yield Damage(f"counts: null is {number + 0.25}", setting("null", "labels", value=number + 0.25))


def _many_files(folder: Path) -> None:
    def change(table: dict) -> None:
        some = {"size": 0, "sha256": ""}
        table["files"] |= {f"f{number}": some for number in range(LIMITS["files"])}

    edit(folder, change)


def names() -> Iterator[Damage]:
    for what, name in {
        "escapes": ESCAPE,
        "bidi": BIDI,
        "a forged line": FORGED,
        "20 MB": None,
        "1 MB": "a" * 1_000_000,
    }.items():
        if name is None:
            continue
        yield Damage(f"names: a port of {what}", setting("ports", 2, "name", value=name))
        yield Damage(f"names: a role of {what}", setting("ports", 2, "role", value=name))
        yield Damage(f"names: a stage's turn of {what}", setting("stages", 0, "runs", value=name))
        yield Damage(f"names: a key of {what}", setting(name, value=1))
        yield Damage(f"names: a solver of {what}", setting("process", "sampler", "solver", value=name))
        yield Damage(f"names: a stage of {what}", setting("stages", 1, "name", value=name), "fine")
        yield Damage(f"names: a model of {what}", setting("model", "name", value=name), "fine")
        yield Damage(f"names: a source of {what}", setting("source", "path", value=name), "fine")
        yield Damage(f"names: a preset of {what}", setting("presets", name, value={"steps": 2}), "fine")
        yield Damage(f"names: a class of {what}", setting("labels", 0, value=name), "fine")
        yield Damage(f"names: a tensor of {what}", setting("stages", 1, "reads", 1, "name", value=name))
        yield Damage(f"names: a backend of {what}", setting("stages", 1, "backend", value=name), "open")
        yield Damage(f"names: a precision of {what}", setting("stages", 1, "precision", value=name), "survives")
        yield Damage(f"names: a size of {what}", setting("size", value=name), "survives")
        yield Damage(f"names: a size's suffix of {what}", setting("suffix", value=name), "survives")


def paths() -> Iterator[Damage]:
    for what, path in PATHS.items():
        yield Damage(f"paths: a file at {what}", listing(path))
        yield Damage(f"paths: a graph at {what}", setting("stages", 1, "onnx", value=path))
        yield Damage(f"paths: shared weights at {what}", setting("stages", 1, "shared", value=[path]))
        yield Damage(f"paths: an engine at {what}", setting("stages", 1, "engines", value={"onnxruntime": [path]}))
        yield Damage(f"paths: a listed graph at {what}", graph_at(path))
    yield Damage("paths: a suffix that leaves", setting("suffix", value="/../../x"), "verify")
    yield Damage(
        "names: a prompt stage's backend of nothing", setting("stages", 0, "backend", value=""), "open", "prompted"
    )
    yield Damage("paths: the manifest as a file", listing(NAME))


def listing(path: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder.parent / "outside").write_text("secret")
        entry = {"size": 6, "sha256": "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"}
        edit(folder, lambda table: table["files"].update({path: entry}))

    return apply


def graph_at(path: str) -> Callable[[Path], None]:
    """The graph is named there under stages and files, with the right sums."""

    def apply(folder: Path) -> None:
        shutil.copy(folder / "denoiser.onnx", folder.parent / "outside")
        shutil.copy(folder / "denoiser.onnx.data", folder.parent / "outside.data")

        def change(table: dict) -> None:
            table["stages"][1]["onnx"] = path
            for end in ("", ".data"):
                table["files"][path + end] = table["files"][f"denoiser.onnx{end}"]

        edit(folder, change)

    return apply


MANIFESTS = (*texts(), *counts(), *names(), *paths())
