"""`dit-export hoist`: split any ONNX graph at the minimum cut before a loop."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dit_runtime.errors import UsageError


def add(commands: Any) -> None:
    parser = commands.add_parser("hoist", help="split any ONNX graph at what does not depend on a loop's input")
    parser.add_argument("path", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--loop-input", nargs="+", required=True, metavar="NAME", help="what changes every step")
    parser.add_argument(
        "--step-input", nargs="+", default=[], metavar="NAME", help="what changes every step, known before the loop"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="default: MODEL-hoisted beside the model")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=run)


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
    if options.json:
        print(json.dumps({"folder": str(folder), "weight_bytes": weights, **hoisted.to_dict()}))
        return 0
    print(f"{len(hoisted.frontier)} tensors cross from {folder / 'invariant.onnx'} to {folder / 'loop.onnx'}")
    for name, size in weights.items():
        print(f"{name}: {size / 1e6:.1f} MB of weights ({size / max(1, sum(weights.values())):.0%})")
    print(hoisted.table())
    return 0
