"""The destination of a build is a whole bundle at any time, and what killed builds left goes with the next."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dit_export.bundle import place
from dit_runtime.bundle import manifest

KILLER = """
import os, random, shutil, signal, sys, time
from dataclasses import replace
from pathlib import Path
from dit_export.bundle.place import put_in_place, workplace
from dit_runtime.bundle import manifest

source, folder, times = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
contract = manifest.read(source)

def build(number):
    with workplace(folder) as work:
        shutil.copytree(source, work / "first")
        manifest.write(work / "first", replace(contract, model={"name": str(number)}))
        put_in_place(work / "first", folder, True)

def seconds_of(number):
    started = time.monotonic()
    build(number)
    return time.monotonic() - started

seconds, source_of_times, seen = min(map(seconds_of, range(5))), random.Random(7), set()
for number in range(5, 5 + times):
    child = os.fork()
    if not child:
        while True:
            build(number)
    time.sleep(10 * seconds * source_of_times.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    now = manifest.read(folder)
    manifest.check_files(folder, now, now.files)
    seen.add(now.model["name"])
    left = len(list(folder.parent.iterdir())) - 1
    assert left <= 2, list(folder.parent.iterdir())
build("last")
assert [path.name for path in folder.parent.iterdir()] == [folder.name]
print(len(seen))
"""


@pytest.fixture
def folder(handmade, tmp_path) -> Path:
    return Path(shutil.copytree(handmade("labels"), tmp_path / "there" / "bundle"))


@pytest.mark.parametrize("times", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_time(handmade, tmp_path, times) -> None:
    """SIGKILL comes from the first copied file to the last removed one; a bundle that is whole is old or new."""
    command = [sys.executable, "-c", KILLER, str(handmade("labels")), str(tmp_path / "there" / "bundle"), str(times)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1, "all builds were killed before they ended"


@pytest.mark.slow
def test_builds_killed_at_any_time(tmp_path) -> None:
    """About 20 minutes of a quiet core."""
    command = [sys.executable, "-m", "tests.killed_builds", str(tmp_path / "there" / "bundle"), "200"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout[-600:] + done.stderr[-2000:]


def test_where_folders_cannot_be_exchanged(folder, handmade, monkeypatch) -> None:
    monkeypatch.setattr(place, "_exchange", lambda *_: False)
    with place.workplace(folder) as work:
        shutil.copytree(handmade("wave"), work / "first")
        assert place.put_in_place(work / "first", folder, True) == folder
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]
    assert manifest.read(folder) == manifest.read(handmade("wave"))


def test_a_bundle_that_was_moved_away_comes_back(folder) -> None:
    """A build was killed between two renames."""
    contract = manifest.read(folder)
    folder.rename(folder.with_name(".bundle.old-0a"))
    with pytest.raises(KeyboardInterrupt), place.workplace(folder):
        assert manifest.read(folder) == contract
        raise KeyboardInterrupt
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_another_build_keeps_what_it_works_on(folder) -> None:
    (folder.parent / ".bundle.partial-0a").mkdir()
    with place.workplace(folder) as first, place.workplace(folder) as second:
        assert first.is_dir() and second.is_dir() and first != second
        assert len(list(folder.parent.iterdir())) == 3
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]
