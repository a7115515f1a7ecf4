"""`dit-export quantize`: an int8 bundle within a budget, and the recipe that builds it again."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_export.cli.console import report_built
from dit_export.cli.recipe import add_recipe, read_recipe
from dit_export.recipe import Recipe
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from dit_runtime.files import write_file
from dit_runtime.progress import Progress


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "quantize", help="build int8 after a search for the layers to keep in float; write the recipe"
    )
    add_recipe(parser)
    parser.add_argument("--budget", metavar="METRIC=N", help="limit at the end of a run: PSNR=35 or latent-rel-l2=0.05")
    parser.add_argument(
        "--tune", action="store_true", help="keep layers in float that int8 does not speed up on this machine"
    )
    parser.add_argument("--recipe", type=Path, metavar="FILE.toml", help="default: BUNDLE.toml beside the bundle")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    from dit_export.bundle.build import build
    from dit_export.precision.budget import Budget, SearchOptions

    recipe = read_recipe(options)
    if options.precision == "fp32" or recipe.precision not in ("fp32", "int8"):
        raise UsageError(f"precision {recipe.precision!r}; expected int8, or nothing")
    budget = Budget.parse(options.budget) if options.budget else None
    if options.recipe and not options.recipe.parent.is_dir():
        raise UsageError(f"{options.recipe}: the folder {options.recipe.parent} does not exist")
    built = build(replace(recipe, precision="int8"), Progress(), SearchOptions(budget, options.tune))
    path = options.recipe or built.folder.with_name(f"{built.folder.name}.toml")
    final = Recipe(**manifest.read(built.folder).source["recipe"])
    write_file(path, final.to_toml())
    code = report_built(built, options.json)
    print(
        f"in float: {', '.join(final.keep_float or []) or 'no layer'}\nrecipe: {path}",
        file=sys.stderr if options.json else sys.stdout,
    )
    return code
