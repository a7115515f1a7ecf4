"""`dit-export`: from a checkpoint to a verified bundle; one command a file."""

from __future__ import annotations

from collections.abc import Sequence

from dit_export.cli import bench, build, conditions, demo, hoist, inspect, quantize, triton, tune, verify
from dit_runtime.console import guarded
from dit_runtime.options import Parser, add_version

# Each adds its parser and names its function.
COMMANDS = (build, conditions, quantize, tune, verify, inspect, hoist, bench, demo, triton)


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded("dit-export", _main, arguments)


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="dit-export", description="Turn a PyTorch diffusion transformer into engines that ship.")
    add_version(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    options = parser.parse_args(arguments)
    result: int = options.command(options)
    return result
