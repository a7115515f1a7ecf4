"""`dit-export inspect`: inputs, outputs, ops and weights of a bundle's graphs or of an ONNX file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="what a bundle or an ONNX file holds")
    parser.add_argument("path", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    from dit_export.graph.inspection import describe, table

    tables = describe(options.path)
    print(json.dumps(tables, indent=1) if options.json else table(tables))
    return 0
