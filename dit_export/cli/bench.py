"""`dit-export bench`: a step and a picture side by side."""

from __future__ import annotations

from typing import Any

from dit_export.bench import command


def add(commands: Any) -> None:
    parser = commands.add_parser("bench", help="a step and a picture, by us and by what people would use instead")
    parser.set_defaults(command=command.add_options(parser))
