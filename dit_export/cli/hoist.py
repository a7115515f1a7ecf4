"""`dit-export hoist`: split any ONNX graph at the minimum cut before a loop."""

from __future__ import annotations

import argparse
from pathlib import Path

from dit_runtime.console import answer
from dit_runtime.errors import UsageError
from dit_runtime.options import Command, Parser


def add_options(parser: Parser) -> None:
    parser.add_argument("path", type=Path, metavar="FILE.onnx", help="the network of one step of a loop")
    group = parser.add_argument_group("inputs")
    group.add_argument("--loop-input", nargs="+", required=True, metavar="NAME", help="inputs that each step changes")
    text = "inputs that change at every step and are known before the loop, such as the timestep"
    group.add_argument("--step-input", nargs="+", default=[], metavar="NAME", help=text)
    group = parser.add_argument_group("output")
    text = "folder for invariant.onnx and loop.onnx; default: FILE-hoisted next to the file"
    group.add_argument("-o", "--output", type=Path, metavar="FOLDER", help=text)


def run(options: argparse.Namespace) -> int:
    from dit_export.graph import onnxfile
    from dit_export.passes.hoist import hoist

    if not options.path.is_file():
        raise UsageError(f"{options.path}: no such file; expected an ONNX model")
    folder = options.output or options.path.with_name(options.path.stem + "-hoisted")
    if folder.resolve() == options.path.parent.resolve():
        raise UsageError(
            f"output {folder}: the folder of the model itself, whose weights are read meanwhile; take another"
        )
    hoisted = hoist(onnxfile.load(options.path), options.loop_input, options.step_input)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, graph in (("invariant", hoisted.invariant), ("loop", hoisted.loop)):
        onnxfile.save(graph, folder / f"{name}.onnx")
        weights[name] = onnxfile.weight_bytes(graph)
    lines = [f"{len(hoisted.frontier)} tensors cross from {folder / 'invariant.onnx'} to {folder / 'loop.onnx'}"]
    for name, size in weights.items():
        lines.append(f"{name}: {size / 1e6:.1f} MB of weights ({size / max(1, sum(weights.values())):.0%})")
    table = {"folder": str(folder), "weight_bytes": weights, **hoisted.to_dict()}
    answer(options, table, "\n".join([*lines, hoisted.table()]), brief=str(folder))
    return 0


COMMAND = Command(
    "hoist",
    "move what does not depend on a loop's input out of an ONNX graph",
    add_options,
    run,
    (
        "hoist denoiser.onnx --loop-input latents",
        "hoist unet.onnx --loop-input sample --step-input timestep -o hoisted",
    ),
)
