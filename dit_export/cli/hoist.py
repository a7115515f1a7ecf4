"""`dit-export hoist`: split any ONNX graph at the minimum cut before a loop."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from dit_runtime.errors import UsageError

SHOWN = 8  # lines of each list


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
    if unknown := [tensor.name for tensor in hoisted.invariant.outputs if tensor.dtype is None]:
        raise UsageError(
            f"{options.path}: {unknown[0]!r} has no known type; run onnx.shape_inference.infer_shapes_path on it first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, graph in (("invariant", hoisted.invariant), ("loop", hoisted.loop)):
        onnxfile.save(graph, folder / f"{name}.onnx")
        weights[name] = onnxfile.weight_bytes(graph)
    shapes = Counter(str(tensor.shape) for tensor in hoisted.invariant.outputs)
    stayed = sorted(hoisted.cut.priced_out, key=lambda entry: -entry.weights)
    if options.json:
        table = {"folder": str(folder), "frontier": hoisted.frontier, "direct": hoisted.cut.direct}
        table |= {"weight_bytes": weights, "priced_out": [entry._asdict() for entry in stayed]}
        print(json.dumps(table))
        return 0
    print(f"{len(hoisted.frontier)} tensors cross from {folder / 'invariant.onnx'} to {folder / 'loop.onnx'}")
    for shape, count in shapes.most_common(SHOWN):
        print(f"  {count} of {shape}")
    if hoisted.cut.direct:
        print(f"the loop reads {', '.join(hoisted.cut.direct)} as well")
    for name, size in weights.items():
        print(f"{name}: {size / 1e6:.1f} MB of weights ({size / max(1, sum(weights.values())):.0%})")
    if stayed:
        print(f"{len(stayed)} ops that the loop input does not reach stay, for they are cheaper there")
    for entry in stayed[:SHOWN]:
        print(
            f"  {entry.op} -> {entry.tensor}: {entry.weights / 1e6:.1f} MB of weights, {entry.bytes / 1e6:.1f} MB to cross"
        )
    return 0
