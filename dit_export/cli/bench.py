"""`dit-export bench`: a step and a picture side by side."""

from __future__ import annotations

from typing import Any

from dit_export.bench import command


def add(commands: Any) -> None:
    parser = commands.add_parser("bench", help="time a step and a picture beside PyTorch, diffusers and plain exports")
    parser.set_defaults(command=command.add_options(parser))
