"""`dit-export tune`: presets with the fewest evaluations for pictures of a given quality."""

from __future__ import annotations

from dit_export.tune import command
from dit_runtime.options import Command

COMMAND = Command(
    "tune",
    "search solver, steps, spacing, guidance and cache; write presets",
    command.add_options,
    command.run,
    (
        "tune BUNDLE",
        "tune BUNDLE --budget balanced:rows=20 fast:rows=14,frechet=2 --presets presets.json",
    ),
)
