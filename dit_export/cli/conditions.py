"""`dit-export conditions`: what a pipeline makes of prompts, as the arrays that its bundle takes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from dit_runtime.files import beside


def add(commands: Any) -> None:
    parser = commands.add_parser("conditions", help="prompts -> arrays for a bundle that was built with --pipeline")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--negative", default="", metavar="TEXT", help="default: the pipeline's own")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE.npz", help="FILE-negative.npz is made beside it"
    )
    parser.set_defaults(command=run)


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
    line = [f"dit-run sample {options.bundle}"]
    rows: Any
    for name, rows in arrays.items():
        file = output if name == "conditions" else output.with_name(f"{output.stem}-negative.npz")
        with beside(file) as partial, partial.open("wb") as opened:
            np.savez(opened, **rows)
        line.append(f"{flags[name]} {file}")
    print(" ".join(line))
    return 0
