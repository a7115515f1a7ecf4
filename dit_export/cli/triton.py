"""`dit-export triton`: a bundle as a model repository of Triton Inference Server."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dit_runtime.errors import UsageError


def add(commands: Any) -> None:
    parser = commands.add_parser("triton", help="a bundle as a model repository of Triton Inference Server")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="REPO", help="the model repository")
    parser.add_argument("--name", help="of the model; default: the bundle's folder")
    parser.add_argument("--decoupled", action="store_true", help="a response for each image; gRPC streams alone")
    parser.add_argument("--threads", type=int, help="of the engines; default: their own choice")
    parser.add_argument("--provider", help="ONNX Runtime's execution provider: cpu, cuda, cuda:N")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="the longest of a request; default: 60")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    from dit_export.bundle import triton

    if options.deadline is not None and not 0 < options.deadline < math.inf:
        raise UsageError(f"--deadline is {options.deadline}; expected a number above 0")
    parameters = {name: getattr(options, name) for name in ("threads", "provider", "deadline")}
    name = options.name or options.bundle.resolve().name
    folder = triton.write(options.bundle, options.output, name, options.decoupled, parameters)
    if options.json:
        print(json.dumps({"folder": str(folder), "name": name}))
    else:
        print(f"model: {folder}\nserve: tritonserver --model-repository={options.output}")
    return 0
