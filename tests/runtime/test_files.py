"""Outputs are whole or not there: on a full disk the old file stays, and nothing is left beside it."""

from __future__ import annotations

import ast
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dit_runtime.cli import main
from dit_runtime.files import beside, write_file
from tests.architecture.test_layers import HOMES

WRITERS = {"write_text", "write_bytes", "savez", "savez_compressed", "save_file", "tofile"}
# Files of a build, which is whole or not there as a folder (bundle/place.py), and of a benchmark's own folder.
INSIDE_A_BUILD = {
    "dit_export.bundle.assemble", "dit_export.bundle.build", "dit_export.bundle.sizes", "dit_export.bundle.triton",
    "dit_export.graph.onnxfile", "dit_export.verify.reference", "dit_export.verify.traced",
    "dit_runtime.verify.prompts",
    "dit_export.bench.competitors", "dit_export.bench.prepare",
}  # fmt: skip


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file of this process have more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["x.png", "x.npz", "x.npy"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_sample_on_a_full_disk(handmade, tmp_path, capsys, name, old) -> None:
    if old is not None:
        (tmp_path / name).write_bytes(old)
    arguments = ["sample", str(handmade("labels")), "--labels", "1", "--steps", "2", "-o", str(tmp_path / name)]
    with full_disk(100):
        assert main(arguments) == 2
    assert "File too large" in capsys.readouterr().err
    assert names(tmp_path) == ([] if old is None else [name])
    assert old is None or (tmp_path / name).read_bytes() == old
    assert main(arguments) == 0
    assert names(tmp_path) == [name] and (tmp_path / name).stat().st_size > 100


def test_a_link_and_rights_stay(tmp_path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    write_file(tmp_path / "link", "newer", follow=False)
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_pipe_is_written_itself(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through" and names(tmp_path) == ["pipe"]
    os.close(reader)


def test_a_folder_is_in_the_way(tmp_path) -> None:
    (tmp_path / "x.npy").mkdir()
    with pytest.raises(OSError, match="directory"), beside(tmp_path / "x.npy") as partial:
        np.save(partial, np.zeros(2))
    assert names(tmp_path) == ["x.npy"]


def test_nothing_else_writes_files() -> None:
    """Calls that write a file stand inside of `with beside(…)`, or in a module that works in a folder of its own."""
    loose = []
    for home, folder in HOMES.items():
        for path in folder.rglob("*.py"):
            module = ".".join([home, *path.relative_to(folder).with_suffix("").parts])
            tree = ast.parse(path.read_text(encoding="utf-8"))
            inside = {
                id(node)
                for block in ast.walk(tree)
                if isinstance(block, ast.With) and any("beside(" in ast.unparse(item) for item in block.items)
                for node in ast.walk(block)
            }
            loose += [
                f"{module}: {ast.unparse(node)[:80]}"
                for node in ast.walk(tree)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)
                and getattr(node.func, "attr", getattr(node.func, "id", "")) in WRITERS
                and id(node) not in inside and module not in INSIDE_A_BUILD
            ]  # fmt: skip
    assert loose == []
