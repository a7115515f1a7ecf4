"""`dit-serve`: serve bundles over HTTP."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dit_runtime import completion
from dit_runtime.console import JSON, guarded
from dit_runtime.errors import UsageError
from dit_runtime.options import Parser, add_debug, add_engine, add_public_key, add_version, set_examples

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded("dit-serve", _main, arguments)


def _main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    key = read_key(options.api_key_file) if options.api_key_file else None
    if options.host not in ("127.0.0.1", "::1", "localhost") and key is None:
        raise UsageError(f"--host {options.host} is open to others: pass --api-key-file FILE too")
    positive = ("batch", "deadline", "job_deadline", "grace", "max_images", "max_steps", "max_pixels")
    for name in positive:
        if (value := getattr(options, name)) is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; expected a number above 0")
    if not 0 <= options.port < 2**16:
        raise UsageError(f"--port is {options.port}; expected 0 to 65535")
    named = _named(options.bundles)
    try:
        from dit_serve.process import serve
    except ImportError as error:
        raise UsageError(f"dit-serve needs the package {error.name}: pip install 'dit-runtime[serve]'") from None
    serve(options, named, key)
    return 0


def parser() -> Parser:
    program = Parser(prog="dit-serve", description="Serve bundles over HTTP with OpenAI's images API.")
    program.add_argument(
        "bundles",
        nargs="+",
        metavar="[NAME=]BUNDLE",
        help="folders of bundles; the first is the default of requests without a model",
    )
    _add_network(program.add_argument_group("network").add_argument)
    _add_requests(program.add_argument_group("requests").add_argument)
    _add_safety(program.add_argument_group("what is served").add_argument)
    group = add_engine(program, low_memory=False)
    group.add_argument(
        "--batch", type=int, metavar="N", help="largest number of images in a call; default: measured at the start"
    )
    group.add_argument(
        "--allow-batch-variance",
        action="store_true",
        help="let --batch exceed 1 where an image depends on the others in its call",
    )
    add_version(program)
    text = "print a script that completes these options in a shell: bash, zsh, fish"
    program.add_argument("--completion", action=completion.Print, choices=completion.SHELLS, metavar="SHELL", help=text)
    program.add_argument("--quiet", action="store_true", help="log warnings and errors alone")
    program.add_argument(JSON, action="store_true", help="print an error as a JSON object on standard output, too")
    add_debug(program)
    set_examples(
        program,
        (
            "BUNDLE",
            "fast=BUNDLE exact=OTHER-BUNDLE --port 8080",
            "BUNDLE --host 0.0.0.0 --api-key-file KEY --deadline 20",
        ),
    )
    return program


def _add_network(add: Callable[..., object]) -> None:
    text = "where to listen; default: 127.0.0.1; any other needs --api-key-file"
    add("--host", default="127.0.0.1", metavar="ADDRESS", help=text)
    add("--port", type=int, default=8000, metavar="N", help="0: any that is free; default: 8000")
    add("--api-key-file", type=Path, metavar="FILE", help="clients must send this key as a bearer token")


def _add_requests(add: Callable[..., object]) -> None:
    text = "longest time for a request; one that cannot finish in time gets 429; default: 60"
    add("--deadline", type=float, default=60.0, metavar="SECONDS", help=text)
    add("--job-deadline", type=float, default=600.0, metavar="SECONDS", help="longest time for a job; default: 600")
    text = "time to finish open requests after SIGTERM; default: 30"
    add("--grace", type=float, default=30.0, metavar="SECONDS", help=text)
    add("--max-images", type=int, default=8, metavar="N", help="images of a request; default: 8")
    add("--max-steps", type=int, default=250, metavar="N", help="steps of a request; default: 250")
    add(
        "--max-pixels",
        type=int,
        default=2**24,
        metavar="N",
        help="pixels of a request's images in all; default: 16777216",
    )


def _add_safety(add: Callable[..., object]) -> None:
    text = "serve only bundles whose manifest.json has one of these sha256"
    add("--pin", nargs="+", default=[], metavar="SHA256", help=text)
    add_public_key(add)
    text = "start without a replay of the reference; a swap always replays it"
    add("--skip-verify", action="store_true", help=text)


def _named(bundles: Sequence[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for text in bundles:
        name, sign, folder = text.partition("=")
        if not sign:
            name, folder = Path(text).resolve().name, text
        if not NAME.fullmatch(name) or name in named:
            raise UsageError(f"bundle {text!r}: expected NAME=BUNDLE, each name once, of letters, digits, and . _ -")
        named[name] = Path(folder)
    return named


def read_key(file: Path) -> bytes:
    key = file.read_bytes().strip()
    if len(key) < 16 or not key.isascii() or len(key.split()) != 1:
        raise UsageError(f"{file}: expected one key of at least 16 characters, without spaces")
    return key


if __name__ == "__main__":
    sys.exit(main())
