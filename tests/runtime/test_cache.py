"""The user's cache: entries that are whole and the user's own, and no more than fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dit_runtime import cache
from dit_runtime.cli import main


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tmp_path.chmod(0o700)
    return tmp_path / "dit-run"


def test_an_entry_comes_back(own) -> None:
    path = own / "a" / "x.kernels"
    assert cache.read(path) is None
    cache.write(path, b"kernels")
    assert cache.read(path) == b"kernels"
    assert own.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["x.kernels"]


@pytest.mark.parametrize(
    "spoil", ["a byte", "cut", "empty", "a link", "others may write it", "a folder that others may write"]
)
def test_what_is_not_sound_is_not_used(own, tmp_path, spoil) -> None:
    path = own / "a" / "x.kernels"
    cache.write(path, b"kernels")
    content = path.read_bytes()
    if spoil == "a byte":
        path.write_bytes(content[:-1] + b"?")
    elif spoil == "cut":
        path.write_bytes(content[:-1])
    elif spoil == "empty":
        path.write_bytes(b"")
    elif spoil == "a link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        (path if spoil == "others may write it" else own).chmod(0o777)
    assert cache.read(path) is None


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else(own, capsys) -> None:
    path = own / "a" / "x.kernels"
    cache.write(path, b"kernels")
    os.chown(own, 12345, 12345)
    assert cache.read(path) is None
    cache.write(own / "b" / "y.kernels", b"kernels")
    assert not (own / "b").exists()
    assert main(["cache", "info"]) == 0 and "not this user's own" in capsys.readouterr().out


def test_what_was_used_least_recently_goes(own, monkeypatch) -> None:
    monkeypatch.setitem(cache.LIMITS, "cache_bytes", 3 * (cache.SUM + 100))
    paths = [own / name / "x.kernels" for name in "abcd"]
    for number, path in enumerate(paths[:3]):
        cache.write(path, bytes(100))
        os.utime(path, (number, number))
    assert cache.read(paths[0]) is not None  # so b was used least recently
    cache.write(paths[3], bytes(100))
    assert [path.exists() for path in paths] == [True, False, True, True]
    assert not paths[1].parent.exists()


def test_the_command(own, capsys) -> None:
    assert main(["cache", "info"]) == 0 and capsys.readouterr().out == "the cache is empty\n"
    cache.write(own / "a" / "x.kernels", bytes(10**6))
    assert main(["cache", "info"]) == 0 and "1 entries, 1.0 MB of at most 2.1 GB" in capsys.readouterr().out
    assert main(["cache", "clear"]) == 0 and "1 entries, 1.0 MB removed" in capsys.readouterr().out
    assert [*own.iterdir()] == []
