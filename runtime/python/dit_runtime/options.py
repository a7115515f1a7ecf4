"""Options that commands share, and the bundle that they open."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from dit_runtime import backends
from dit_runtime.console import DEBUG
from dit_runtime.errors import UsageError
from dit_runtime.facts import VERSION
from dit_runtime.pipeline import Pipeline


class Parser(argparse.ArgumentParser):
    """Raises its errors as UsageError, so that they are one line too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"epilog": f"{DEBUG} shows the traceback of an error."} | options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}", help="the version of the package")


def add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder with a manifest.json")
    parser.add_argument("--threads", type=int, help="of the engine; default: its own choice")
    parser.add_argument("--provider", help="ONNX Runtime's execution provider: cpu, cuda, cuda:N")
    parser.add_argument("--low-memory", action="store_true", help="open one stage at a time, while it is needed")
    parser.add_argument("--json", action="store_true", help="for machines, on standard output")


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", help="one of the bundle's, 512 or 512x768 for height x width; default: its first")


def load_bundle(options: argparse.Namespace, size: str | None = None) -> Pipeline:
    names = ("threads", "provider", "low_memory")
    pipe = Pipeline.load(options.bundle, size=size, **{name: getattr(options, name) for name in names})
    lines = [backends.note(stage.backend, stage.precision) for stage in pipe.manifest.stages]
    for line in dict.fromkeys(lines):
        if line:
            print(f"note: {line}", file=sys.stderr)
    return pipe
