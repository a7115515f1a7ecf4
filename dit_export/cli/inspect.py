"""`dit-export inspect`: inputs, outputs, ops and weights of a bundle's graphs or of an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path

from dit_runtime.console import answer
from dit_runtime.options import Command, Parser


def add_options(parser: Parser) -> None:
    parser.add_argument("path", type=Path, metavar="BUNDLE|FILE.onnx", help="a bundle's folder, or an ONNX file")


def run(options: argparse.Namespace) -> int:
    from dit_export.graph.inspection import describe, table

    tables = describe(options.path)
    answer(options, tables, table(tables))
    return 0


COMMAND = Command(
    "inspect",
    "show inputs, outputs, ops and weights of a bundle or an ONNX file",
    add_options,
    run,
    ("inspect BUNDLE", "inspect BUNDLE/denoiser.onnx --json"),
)
