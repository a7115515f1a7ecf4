"""The boundary of a command: one printable line, its exit code, and what only --debug shows."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dit_runtime.console import guarded, line
from dit_runtime.errors import BundleError, EngineError, GateError, Stopped, UsageError
from dit_runtime.facts import LIMITS

MOST = LIMITS["message"]
CODES = [
    (UsageError("what"), 2),
    (BundleError("what"), 2),
    (EngineError("what"), 2),
    (OSError(28, "No space left on device"), 2),
    (MemoryError(), 2),
    (GateError("what"), 1),
    (Stopped("what"), 1),
    (KeyboardInterrupt(), 130),
    (TypeError("what"), 70),
    (RecursionError("what"), 70),
    (AssertionError(), 70),
]


def raising(error: BaseException):
    def command(arguments: list[str]) -> int:
        raise error

    return command


@pytest.mark.parametrize(("error", "code"), CODES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("debug", [False, True])
def test_codes(capsys, error, code, debug) -> None:
    assert guarded("dit-run", raising(error), ["--debug"] * debug) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("dit-run: error: ") and (len(lines) == 1) != debug
    assert debug == any("Traceback" in text for text in lines)
    assert ("a bug" in lines[-1] and "--debug" in lines[-1] and "CONTRIBUTING.md" in lines[-1]) == (code == 70)


def test_a_warning_is_no_second_line() -> None:
    """In a process of its own, where nothing else looks at warnings."""
    code = (
        "import warnings; from dit_runtime.console import guarded; guarded('x', lambda _: warnings.warn('w') or 0, {})"
    )
    for options, shown in (([], False), (["--debug"], True)):
        command = [sys.executable, "-c", code.format(options)]
        assert ("UserWarning: w" in subprocess.run(command, capture_output=True, text=True).stderr) == shown


def test_the_option_is_no_commands_own() -> None:
    seen: list[str] = []
    assert guarded("dit-run", lambda words: seen.extend(words) or 0, ["info", "--debug", "x"]) == 0
    assert seen == ["info", "x"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\nc\td", "a b c d"),
        ("\x1b[2Jx\x07\x9b", "\\x1b[2Jx\\x07\\x9b"),
        ("\u202egnp.exe\u200b\u2066", "\\u202egnp.exe\\u200b\\u2066"),
        ("\ud800", "\\ud800"),
        ("Größe 東京 🙂", "Größe 東京 🙂"),
    ],
)
def test_a_terminal_shows_and_does_not_obey(text, shown) -> None:
    assert line(text) == shown


def test_a_long_line_keeps_its_ends() -> None:
    cut = line("start " + "x" * 10_000_000 + " end")
    assert len(cut) == MOST and cut.startswith("start x") and cut.endswith("x end") and " … " in cut
    assert line("x" * MOST) == "x" * MOST
    assert len(line("\x1b" * MOST)) == MOST
