"""The boundary of a command: one printable line, its exit code, and what only --debug shows."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from argparse import Namespace

import pytest

from dit_runtime.console import answer, coloured, guarded, line, note
from dit_runtime.errors import BundleError, EngineError, GateError, Stopped, UsageError
from dit_runtime.facts import LIMITS
from dit_runtime.progress import Counted, Progress

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
    arguments: list[str] = []
    assert guarded("dit-run", lambda words: arguments.extend(words) or 0, ["info", "--debug", "x"]) == 0
    assert arguments == ["info", "x"]


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


@pytest.mark.parametrize(("error", "code"), CODES, ids=lambda value: type(value).__name__)
def test_an_error_for_machines(capsys, error, code) -> None:
    assert guarded("dit-run", raising(error), ["info", "--json"]) == code
    printed = capsys.readouterr()
    table = json.loads(printed.out)["error"]
    assert table["exit_code"] == code
    assert table["kind"] == {1: "failed", 2: "refused", 70: "bug", 130: "interrupted"}[code]
    assert printed.err == f"dit-run: error: {table['message']}\n"


def test_nothing_but_the_object_is_on_standard_output(capsys) -> None:
    def command(words: list[str]) -> int:
        options = Namespace(json="--json" in words, quiet="--quiet" in words)
        progress = Progress(quiet=options.quiet)
        with progress.stage("work"):
            note(options, "note: slow")
            Counted(progress, "things")(5, 10)
        answer(options, {"psnr": [math.inf, math.nan, 1.5]}, "a table\nof it", brief="path")
        return 0

    assert guarded("dit-run", command, ["--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"psnr": ["inf", "nan", 1.5]}
    assert [text.partition(":")[0] for text in printed.err.splitlines()] == ["note", "5 of 10 things", "work"]
    assert guarded("dit-run", command, ["--json", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert guarded("dit-run", command, ["--quiet"]) == 0
    assert capsys.readouterr() == ("path\n", "")
    assert guarded("dit-run", command, []) == 0
    assert capsys.readouterr().out == "a table\nof it\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_and_bars_need_a_terminal_that_wants_them(monkeypatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    text = "FAILED x: verified; FAILEDx"
    assert coloured(text, Terminal()) == "\x1b[31mFAILED\x1b[0m x: \x1b[32mverified\x1b[0m; FAILEDx"
    assert coloured(text, io.StringIO()) == text
    assert Progress(Terminal()).shown and not Progress(Terminal(), quiet=True).shown
    monkeypatch.setenv("TERM", "dumb")
    assert coloured(text, Terminal()) == text and not Progress(Terminal()).shown
    monkeypatch.setenv("TERM", "xterm")
    for value, plain in (("1", True), ("", False)):
        monkeypatch.setenv("NO_COLOR", value)
        assert (coloured(text, Terminal()) == text) == plain and Progress(Terminal()).shown
