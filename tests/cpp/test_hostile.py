"""dit-generate gives each hostile bundle the verdict that Python gives it: in one line, soon, and in little memory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest

from dit_runtime.facts import LIMITS
from tests.hostile import REFUSED, VERDICTS, Damage
from tests.hostile.bundles import BUNDLES

SAMPLED = 40  # one of so many in `make test`
SECONDS, BYTES = 10, 1 << 30
# A process starts with its parent's peak as its own: pytest's would be more than the limit.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    file.write(f"{code} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}")
"""
ARGUMENTS = {"verify": ["--verify"], "sample": ["--labels", "1", "--steps", "2", "-o", "x.npy"]}


def sampled() -> list:
    """Mark all but some as slow."""
    return [
        pytest.param(damage, id=damage.name[:60], marks=[pytest.mark.slow] * bool(number % SAMPLED))
        for number, damage in enumerate(BUNDLES)
    ]


def run(build: Path, folder: Path, command: str, place: Path) -> tuple[int, str, str, int]:
    """Return exit code, output, errors and the most memory that it took."""
    words = [str(build / "programs/dit-generate"), str(folder), *ARGUMENTS[command], "--threads", "1"]
    environment = os.environ | {"XDG_CACHE_HOME": str(place / "cache")}
    streams = place / "out", place / "err"
    with streams[0].open("wb") as out, streams[1].open("wb") as err:
        small = [sys.executable, "-S", "-c", MEASURE, place / "usage", *words]
        process = subprocess.Popen(
            small, stdout=out, stderr=err, cwd=place / "work", env=environment, start_new_session=True
        )
        timer = Timer(SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        process.wait()
        timer.cancel()
    assert process.returncode == 0, f"{words}: more than {SECONDS} s"
    code, most = map(int, (place / "usage").read_text().split())
    return code, *(stream.read_bytes().decode() for stream in streams), 1024 * most


@pytest.mark.parametrize("damage", sampled())
def test_verdict(damage: Damage, build, handmade, tmp_path) -> None:
    folder = Path(shutil.copytree(handmade(damage.kind), tmp_path / "in" / "bundle"))
    damage.apply(folder)
    (tmp_path / "work").mkdir()
    for command in ARGUMENTS:
        code, out, err, memory = run(build, folder, command, tmp_path)
        expected = VERDICTS[damage.verdict][command]
        assert code in ((0, 1, REFUSED) if expected is None else (expected,)), (code, err[-600:])
        assert all(mark.isprintable() or mark == "\n" for mark in out + err), (out[:300], err[:300])
        assert memory < BYTES
        if code == REFUSED:
            lines = err.splitlines()
            assert len(lines) == 1 and lines[0].startswith("dit-generate: error: ") and not out, (lines[:5], out[:300])
            assert len(lines[0]) <= LIMITS["message"], lines
