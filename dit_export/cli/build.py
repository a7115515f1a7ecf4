"""`dit-export build`: a checkpoint to a verified bundle."""

from __future__ import annotations

import argparse
from typing import Any

from dit_export.cli.console import report_built
from dit_export.cli.recipe import add_recipe, read_recipe
from dit_runtime.progress import Progress


def add(commands: Any) -> None:
    parser = commands.add_parser("build", help="checkpoint -> verified bundle")
    add_recipe(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    from dit_export.bundle.build import build

    return report_built(build(read_recipe(options), Progress()), options.json)
