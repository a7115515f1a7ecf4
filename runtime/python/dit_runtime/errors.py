"""The user's own mistakes: one line that says what, where, got and expected, and what to do next."""

from __future__ import annotations

from collections.abc import Iterable


class UsageError(Exception):
    """Bad usage or bad input; the command lines print it as one line and exit with 2."""


class BundleError(UsageError):
    """A bundle that is damaged, of another format, or cannot run here."""


class EngineError(RuntimeError):
    """An engine gave something that no sound engine gives."""


class NotFinite(EngineError):
    """An engine gave NaN or infinity."""


class Stopped(Exception):
    """A run was cancelled, or `on_step` asked to stop it."""


class GateError(Exception):
    """Something was made and is not what was asked for; the command lines exit with 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean "…"?)' where something known is close, else nothing."""
    import difflib  # here, so that importing the runtime stays quick

    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lowered, n=1)
    return f' (did you mean "{lowered[close[0]]}"?)' if close else ""
