"""`dit-export tune`: presets that ask the network least for pictures of a given quality."""

from __future__ import annotations

from typing import Any

from dit_export.tune import command


def add(commands: Any) -> None:
    parser = commands.add_parser("tune", help="search solver, steps, spacing, guidance and cache; write presets")
    parser.set_defaults(command=command.add_options(parser))
