"""Progress of long work, on standard error: a bar on a terminal, a plain line for each stage elsewhere; or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from dit_runtime.console import is_terminal

BAR = 24


class Progress:
    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream, self._quiet = stream or sys.stderr, quiet
        self.shown = is_terminal(self._stream) and not quiet  # whether there is a bar
        self._start = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name a stage when it starts, and its seconds when it ends."""
        began = time.monotonic()
        if self.shown:
            self._write(f"\r\x1b[K{name} …")
        try:
            yield
        except BaseException:
            self.end()
            raise
        line = f"{name}: {time.monotonic() - began:.1f} s (at {_clock(time.monotonic() - self._start)})"
        self.say(line)

    def say(self, line: str) -> None:
        self._write(f"\r\x1b[K{line}\n" if self.shown else f"{line}\n")

    def step(self, done: int, total: int, name: str) -> None:
        """Move the bar; in a pipe there is none."""
        if not self.shown:
            return
        filled = BAR * done // total
        elapsed = time.monotonic() - self._start
        self._write(f"\r\x1b[K{name} [{'#' * filled}{'.' * (BAR - filled)}] {done}/{total} {_clock(elapsed)}")

    def end(self) -> None:
        """Clear the bar."""
        if self.shown:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        if self._quiet:
            return
        self._stream.write(text)
        self._stream.flush()


class Counted:
    """Progress of things by number: a bar on a terminal, elsewhere a line at each tenth."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name, self._tenth = progress, name, 0

    def __call__(self, done: int, total: int) -> None:
        self._progress.step(done, total, self._name)
        tenth = 10 * done // total
        if tenth > self._tenth and not self._progress.shown:
            self._progress.say(f"{done} of {total} {self._name}")
        self._tenth = tenth


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
