"""Each hostile bundle gets its verdict: in one line, soon, in little memory, and without a trace outside of it."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dit_runtime.cli import main
from dit_runtime.facts import LIMITS
from tests.hostile import REFUSED, VERDICTS, Damage
from tests.hostile.bundles import BUNDLES
from tests.hostile.mutations import mutations

SAMPLED, ALONE = 15, 40  # one of so many in `make test`; in a process of its own
SECONDS, BYTES = 10, 1 << 30
ARGUMENTS = {
    "info": [],
    "verify": ["--threads", "1"],
    "sample": ["--labels", "1", "--steps", "2", "-o", "x.npy", "--threads", "1"],
}


def sampled(damages: tuple[Damage, ...]) -> list:
    """Mark all but some as slow."""
    return [
        pytest.param(damage, id=damage.name[:60], marks=[pytest.mark.slow] * bool(number % SAMPLED))
        for number, damage in enumerate(damages)
    ]


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise AssertionError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def peak() -> int:
    """Return the most memory that this process had at a time since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def check_output(code: int, expected: int | None, out: bytes, err: bytes) -> None:
    assert code in ((0, 1, REFUSED) if expected is None else (expected,)), (code, err[-600:])
    for stream in (out, err):
        shown = stream.decode()
        assert all(mark.isprintable() or mark == "\n" for mark in shown), shown[:600]
    if code == REFUSED:
        lines = err.decode().splitlines()
        assert len(lines) == 1 and lines[0].startswith("dit-run: error: ") and not out, (lines[:5], out[:300])
        assert len(lines[0]) <= LIMITS["message"], lines


@pytest.fixture
def place(handmade, tmp_path, monkeypatch) -> Callable[[Damage], Path]:
    """Damage a copy, beside an empty folder to work in."""

    def make(damage: Damage) -> Path:
        folder = Path(shutil.copytree(handmade(damage.kind), tmp_path / "in" / "bundle"))
        damage.apply(folder)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        return folder

    return make


@pytest.mark.parametrize("damage", sampled(BUNDLES))
def test_verdict(damage, place, tmp_path, capfd, listing) -> None:
    folder = place(damage)
    for command, expected in VERDICTS[damage.verdict].items():
        before = listing(tmp_path)
        forget_peak()
        start = peak()
        capfd.readouterr()
        with within(SECONDS):
            code = main([command, str(folder), *ARGUMENTS[command]])
        captured = capfd.readouterr()
        check_output(code, expected, captured.out.encode(), captured.err.encode())
        assert peak() - start < BYTES
        (tmp_path / "work" / "x.npy").unlink(missing_ok=True)
        after = listing(tmp_path)
        assert [entry for entry in after if "/work" not in entry[0]] == [e for e in before if "/work" not in e[0]]
        assert not [*(tmp_path / "work").iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("damage", BUNDLES[::ALONE], ids=lambda damage: damage.name[:60])
def test_in_a_process_of_its_own(damage, place, tmp_path) -> None:
    """As a shell sees it: no signal, and no more memory than it may have."""
    folder = place(damage)
    command = [sys.executable, "-m", "dit_runtime.cli", "verify", str(folder), "--threads", "1"]
    limit = 6 << 30  # of addresses, which engines reserve by the gigabyte

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    done = subprocess.run(command, capture_output=True, timeout=3 * SECONDS, preexec_fn=limited, cwd=tmp_path / "work")
    check_output(done.returncode, VERDICTS[damage.verdict]["verify"], done.stdout, done.stderr)


KINDS = ("labels", "captioned", "wave", "video", "sizes", "embedded", "prompted")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "sizes")) for kind in KINDS])
def test_every_value_of_every_kind(kind, handmade, tmp_path, capfd) -> None:
    """Read or refused, never a bug; `make test` takes few of them."""
    folder = Path(shutil.copytree(handmade(kind), tmp_path / "bundle"))
    every, wrong = 1 if kind != "sizes" else 211, []
    verdicts = Counter[int]()
    for name, text in mutations(folder, every):
        (folder / "manifest.json").write_text(text)
        with within(SECONDS):
            code = main(["info", str(folder)])
        captured = capfd.readouterr()
        verdicts[code] += 1
        try:
            assert code != 1
            check_output(code, None, captured.out.encode(), captured.err.encode())
        except AssertionError as error:
            wrong.append(f"{name}: {error}"[:300])
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong[:40])
    assert verdicts[REFUSED] > verdicts[0]


@pytest.mark.slow
def test_every_value_of_every_kind_in_a_run(handmade, tmp_path, monkeypatch, capfd) -> None:
    """Values that a manifest may have and its files do not bear out."""
    folder = Path(shutil.copytree(handmade("labels"), tmp_path / "bundle"))
    monkeypatch.chdir(tmp_path)
    wrong = []
    for name, text in mutations(folder):
        (folder / "manifest.json").write_text(text)
        forget_peak()
        start = peak()
        with within(SECONDS):
            code = main(["verify", str(folder), *ARGUMENTS["verify"]])
        captured = capfd.readouterr()
        try:
            check_output(code, None, captured.out.encode(), captured.err.encode())
            assert peak() - start < BYTES
        except AssertionError as error:
            wrong.append(f"{name}: {error}"[:300])
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong[:40])
