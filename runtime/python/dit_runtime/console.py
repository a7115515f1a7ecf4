"""The one boundary of each command: errors become one line and an exit code, and text reaches a terminal escaped."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence

from dit_runtime.errors import EngineError, GateError, Stopped, UsageError
from dit_runtime.facts import LIMITS

REFUSED, FAILED, INTERRUPTED = 2, 1, 130
BUG = 70  # EX_SOFTWARE of sysexits.h
CLOSED_PIPE = 141  # 128 + SIGPIPE, as a shell reports of other programs
DEBUG = "--debug"
REPORT = "report it to the project, as CONTRIBUTING.md says"
CODES: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], int], ...] = (
    ((UsageError, EngineError, OSError, MemoryError), REFUSED),
    ((GateError, Stopped), FAILED),
    (KeyboardInterrupt, INTERRUPTED),
)


def guarded(program: str, command: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a command; what the user or a file did wrong is one line and exit code 2, a failed gate 1, ctrl-c 130.

    Anything else is a bug, exit code 70. The option --debug, of every command, shows the traceback of an error. Where
    nobody reads the output any more, as behind `| head`, it ends in silence.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
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
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())  # what is left to be written at exit
        return CLOSED_PIPE
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            import traceback  # here, so that importing the runtime stays quick

            traceback.print_exc()
        code = next((code for kinds, code in CODES if isinstance(error, kinds)), BUG)
        print(line(f"{program}: error: {_message(error, code)}"), file=sys.stderr)
    return code


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
