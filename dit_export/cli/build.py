"""`dit-export build`: a checkpoint to a verified bundle."""

from __future__ import annotations

import argparse

from dit_export.cli.console import report_built
from dit_export.cli.recipe import add_recipe, read_recipe
from dit_runtime.options import Command
from dit_runtime.progress import Progress


def run(options: argparse.Namespace) -> int:
    from dit_export.bundle.build import build

    recipe = read_recipe(options)
    return report_built(options, build(recipe, Progress(quiet=options.quiet)), recipe)


COMMAND = Command(
    "build",
    "build and verify a bundle from a checkpoint",
    add_recipe,
    run,
    (
        "build S/2 --synthetic -o first-bundle  # random weights, no download",
        "build --checkpoint my-pipeline --resolution 512,512x768 -o my-bundle",
        "build --checkpoint my-dit.pt --precision int8 --backend openvino -o my-int8",
    ),
)
