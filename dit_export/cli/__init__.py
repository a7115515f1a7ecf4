"""`dit-export`: from a checkpoint to a verified bundle; one command a file."""

from __future__ import annotations

from collections.abc import Sequence

from dit_export.cli import bench, build, conditions, demo, hoist, inspect, quantize, sign, triton, tune, verify
from dit_runtime import completion
from dit_runtime.console import guarded
from dit_runtime.errors import UsageError
from dit_runtime.options import Parser, add_commands, add_version

COMMANDS = {
    "build": (build.COMMAND, quantize.COMMAND, tune.COMMAND, conditions.COMMAND),
    "prove": (verify.COMMAND, verify.REGRESS),
    "look": (inspect.COMMAND, hoist.COMMAND, bench.COMMAND),
    "more": (demo.COMMAND, sign.COMMAND, triton.COMMAND, completion.COMMAND),
}


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded("dit-export", _main, arguments)


def _main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    try:
        result: int = options.command(options)
    except ModuleNotFoundError as error:  # the gate's commands run without these packages
        if (error.name or "dit").startswith("dit"):
            raise
        raise UsageError(f"this needs the package {error.name}: pip install 'dit-export[export]'") from error
    return result


def parser() -> Parser:
    program = Parser(prog="dit-export", description="Turn a PyTorch diffusion transformer into engines that ship.")
    add_version(program)
    return add_commands(program, COMMANDS)
