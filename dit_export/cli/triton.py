"""`dit-export triton`: a bundle as a model repository of Triton Inference Server."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from dit_runtime.console import answer
from dit_runtime.errors import UsageError
from dit_runtime.options import Command, Parser, add_bundle, add_engine, add_public_key


def add_options(parser: Parser) -> None:
    add_bundle(parser)
    group = parser.add_argument_group("model")
    group.add_argument("--name", metavar="NAME", help="name of the model; default: the bundle's folder")
    text = "send a response for each image; clients then need gRPC streams"
    group.add_argument("--decoupled", action="store_true", help=text)
    group.add_argument("--deadline", type=float, metavar="SECONDS", help="longest time for a request; default: 60")
    add_engine(parser, low_memory=False)
    add_public_key(parser.add_argument_group("safety").add_argument)
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the model repository")


def run(options: argparse.Namespace) -> int:
    from dit_export.bundle import triton

    if options.deadline is not None and not 0 < options.deadline < math.inf:
        raise UsageError(f"--deadline is {options.deadline}; expected a number above 0")
    parameters = {name: getattr(options, name) for name in ("threads", "provider", "deadline")}
    key = options.public_key
    parameters["public_key"] = None if key is None else key.hex()
    name = options.name or options.bundle.resolve().name
    folder = triton.write(options.bundle, options.output, name, options.decoupled, parameters, key)
    text = f"model: {folder}\nserve: tritonserver --model-repository={options.output}"
    answer(options, {"folder": str(folder), "name": name}, text, brief=str(folder))
    return 0


COMMAND = Command(
    "triton",
    "write a bundle as a model repository of Triton Inference Server",
    add_options,
    run,
    ("triton BUNDLE -o repository --name dit",),
)
