"""The output of commands, for people and machines, and the one boundary where errors become a line and an exit code.

Standard output has what was asked for; progress, notes and errors go to standard error. A terminal gets text escaped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from dit_runtime.errors import EngineError, GateError, Stopped, UsageError
from dit_runtime.facts import LIMITS

REFUSED, FAILED, INTERRUPTED = 2, 1, 130
BUG = 70  # EX_SOFTWARE of sysexits.h
CLOSED_PIPE = 141  # 128 + SIGPIPE, as a shell reports of other programs
KINDS = {REFUSED: "refused", FAILED: "failed", INTERRUPTED: "interrupted", BUG: "bug"}  # of errors, in JSON
DEBUG, JSON = "--debug", "--json"
COLOURS = {"FAILED": 31, "error:": 31, "warning:": 33, "next:": 36, "verified": 32}  # of words, on a terminal
REPORT = "report it to the project, as CONTRIBUTING.md says"
CODES: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], int], ...] = (
    ((UsageError, EngineError, OSError, MemoryError), REFUSED),
    ((GateError, Stopped), FAILED),
    (KeyboardInterrupt, INTERRUPTED),
)


def guarded(program: str, command: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a command; what the user or a file did wrong is one line and exit code 2, a failed gate 1, ctrl-c 130.

    Anything else is a bug, exit code 70. The option --debug, of every command, shows the traceback of an error. With
    --json an error is an object on standard output too. Where nobody reads the output any more, as behind `| head`,
    it ends in silence.
    """
    try:
        return _run(program, command, list(sys.argv[1:] if arguments is None else arguments))
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())  # what is left to be written at exit
        return CLOSED_PIPE


def _run(program: str, command: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    debug = DEBUG in words
    try:
        try:
            with warnings.catch_warnings():
                if not debug:  # a second line, of what a library thinks of a file
                    warnings.simplefilter("ignore")
                return command([word for word in words if word != DEBUG])
        finally:
            print(end="", flush=True)  # here, where a closed pipe is caught; else at exit
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            import traceback  # here, so that importing the runtime stays quick

            traceback.print_exc()
        code = next((code for kinds, code in CODES if isinstance(error, kinds)), BUG)
        message = line(_message(error, code))
        print(coloured(line(f"{program}: error: {message}"), sys.stderr), file=sys.stderr)
        if JSON in words:
            print_json({"error": {"kind": KINDS[code], "message": message, "exit_code": code}})
    return code


def answer(options: argparse.Namespace, table: Mapping[str, Any], text: str, brief: str | None = None) -> None:
    """Print what was asked for: for people the text, or with --quiet what is `brief`; with --json the table alone."""
    if options.json:
        print_json(table)
    elif shown := printable(text if brief is None or not options.quiet else brief):
        print(coloured(shown, sys.stdout))


def print_json(table: Mapping[str, Any]) -> None:
    """Print an object; JSON knows no NaN and no ∞, whose texts stand for them."""
    print(json.dumps(_finite(table), indent=1, allow_nan=False), flush=True)  # in ASCII: no terminal obeys it


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def note(options: argparse.Namespace, text: str) -> None:
    """Print what a person may want to know too, on standard error; --quiet leaves it out."""
    if not options.quiet:
        print(coloured(printable(text), sys.stderr), file=sys.stderr)


def is_terminal(stream: TextIO) -> bool:
    """Return whether a person watches, on a terminal that moves its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def coloured(text: str, stream: TextIO) -> str:
    """Return the text with the colours of its verdicts, where it goes to a terminal and NO_COLOR is not set."""
    if os.environ.get("NO_COLOR") or not is_terminal(stream):
        return text
    words = "|".join(map(re.escape, COLOURS))
    return re.sub(rf"\b({words})(?!\w)", lambda match: f"\x1b[{COLOURS[match[0]]}m{match[0]}\x1b[0m", text)


def _message(error: BaseException, code: int) -> str:
    if code == INTERRUPTED:
        return "interrupted"
    if isinstance(error, MemoryError):
        return f"memory ran out: {error}" if str(error) else "memory ran out"
    text = str(error) or type(error).__name__
    return f"a bug: {type(error).__name__}: {text}; {REPORT}, with what {DEBUG} shows" if code == BUG else text


def line(text: str, most: int = LIMITS["message"]) -> str:
    """Return a text of any source as one printable line; the middle of a long one is left out."""
    escaped = printable(" ".join(text.split()))
    if len(escaped) <= most:
        return escaped
    end = most // 3
    return f"{escaped[: most - end - 3]} … {escaped[-end:]}"


def printable(text: str) -> str:
    """Return a text whose characters a terminal shows and does not obey; line breaks stay."""
    return "".join(
        mark if mark.isprintable() or mark == "\n" else mark.encode("unicode_escape", "surrogatepass").decode()
        for mark in text
    )
