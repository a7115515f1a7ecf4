"""`dit-export conditions`: what a pipeline makes of prompts, as the arrays that its bundle takes."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.bundle import manifest
from dit_runtime.console import answer
from dit_runtime.errors import UsageError
from dit_runtime.files import beside
from dit_runtime.options import Command, Parser, add_bundle


def add_options(parser: Parser) -> None:
    add_bundle(parser)
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="a prompt for each picture")
    text = "a prompt to lead away from; default: the pipeline's own"
    group.add_argument("--negative", default="", metavar="TEXT", help=text)
    group = parser.add_argument_group("output")
    text = "the arrays of the prompts; FILE-negative.npz gets those of the negative"
    group.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.npz", help=text)


def run(options: argparse.Namespace) -> int:
    contract, output = manifest.read(options.bundle), options.output
    if contract.source.get("kind") != "pipeline":
        raise UsageError(
            f"{options.bundle}: was not built with --pipeline; pass prompts or embeddings to `dit-run sample`"
        )
    if output.suffix != ".npz":
        raise UsageError(f"output {output}: expected FILE.npz")
    if not output.parent.is_dir():  # before the long work
        raise UsageError(f"output {output}: the folder {output.parent} does not exist")
    from dit_export.checkpoints import recipe_of
    from dit_export.checkpoints.pipelines import record_conditions

    recipe = recipe_of(contract, options.bundle)
    recipe = replace(recipe, resolution=recipe.sizes[0])
    folder = Path(str(recipe.pipeline)).expanduser()
    arrays = record_conditions(folder, recipe, options.prompt, options.negative, contract.source["sha256"])
    flags = {"conditions": "--condition", "negative": "--negative-condition"}
    line, files = [f"dit-run sample {shlex.quote(str(options.bundle))}"], {}
    rows: Any
    for name, rows in arrays.items():
        file = output if name == "conditions" else output.with_name(f"{output.stem}-negative.npz")
        with beside(file) as partial, partial.open("wb") as opened:
            np.savez(opened, **rows)
        line.append(f"{flags[name]} {shlex.quote(str(file))}")
        files[name] = str(file)
    answer(options, {"output": files, "next": [" ".join(line)]}, " ".join(line), brief="\n".join(files.values()))
    return 0


COMMAND = Command(
    "conditions",
    "write prompts as arrays, for a bundle built with --pipeline",
    add_options,
    run,
    ('conditions BUNDLE --prompt "a photo of a cat" --negative blurry -o cat.npz',),
)
