"""`dit-export quantize`: an int8 bundle within a budget, and the recipe that builds it again."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dit_export.cli.console import report_built
from dit_export.cli.recipe import add_recipe, read_recipe
from dit_export.recipe import Recipe
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from dit_runtime.files import write_file
from dit_runtime.options import Command, Parser
from dit_runtime.progress import Progress


def add_options(parser: Parser) -> None:
    add_recipe(parser)
    group = parser.add_argument_group("search")
    text = "limit of the error at the end of a run: PSNR=35 or latent-rel-l2=0.05"
    group.add_argument("--budget", metavar="NAME=X", help=text)
    text = "keep layers in float that int8 does not speed up on this machine"
    group.add_argument("--tune", action="store_true", help=text)
    text = "where to write the recipe that builds it again; default: BUNDLE.toml next to the bundle"
    group.add_argument("--recipe", type=Path, metavar="FILE.toml", help=text)


def run(options: argparse.Namespace) -> int:
    from dit_export.bundle.build import build
    from dit_export.precision.budget import Budget, SearchOptions

    recipe = read_recipe(options)
    if options.precision == "fp32" or recipe.precision not in ("fp32", "int8"):
        raise UsageError(f"precision {recipe.precision!r}; expected int8, or nothing")
    budget = Budget.parse(options.budget) if options.budget else None
    if options.recipe and not options.recipe.parent.is_dir():
        raise UsageError(f"{options.recipe}: the folder {options.recipe.parent} does not exist")
    built = build(replace(recipe, precision="int8"), Progress(quiet=options.quiet), SearchOptions(budget, options.tune))
    path = options.recipe or built.folder.with_name(f"{built.folder.name}.toml")
    final = Recipe(**manifest.read(built.folder).source["recipe"])
    write_file(path, final.to_toml())
    more = {"recipe": str(path), "keep_float": final.keep_float or []}
    lines = [f"in float: {', '.join(final.keep_float or []) or 'no layer'}", f"recipe: {path}"]
    return report_built(options, built, replace(recipe, precision="int8"), more, lines)


COMMAND = Command(
    "quantize",
    "build int8 with the fewest layers in float; write the recipe",
    add_options,
    run,
    (
        "quantize --checkpoint my-dit.pt --budget PSNR=35 -o my-int8",
        "quantize recipe.toml --tune --backend openvino",
    ),
)
