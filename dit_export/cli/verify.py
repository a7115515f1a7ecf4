"""`dit-export verify`: a bundle against PyTorch, a baseline or another bundle; `regress`: without the weights."""

from __future__ import annotations

from functools import partial

from dit_export.verify import command
from dit_runtime.options import Command

COMMAND = Command(
    "verify",
    "compare a bundle with PyTorch, a baseline or another bundle",
    command.add_options,
    command.run,
    (
        "verify BUNDLE --report report.html",
        "verify BUNDLE --baseline baseline.json --junit figures.xml  # for CI",
        "verify BUNDLE --against CORRECT-BUNDLE  # names the first tensor that differs",
    ),
)
REGRESS = Command(
    "regress",
    "verify a bundle by its recorded reference, without the weights",
    partial(command.add_options, weights=False),
    command.run,
    (
        "regress BUNDLE --report report.html",
        "regress BUNDLE --baseline baseline.json --update-baseline",
    ),
)
