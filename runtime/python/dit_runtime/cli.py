"""`dit-run`: sample, info, verify, compile and bench a bundle, with NumPy and one engine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dit_runtime import backends, bench, cache, sample, verify
from dit_runtime.backends import Options, Tuning
from dit_runtime.bundle import manifest
from dit_runtime.bundle.compiling import compile_stages, provider, remove, why_unavailable
from dit_runtime.bundle.summary import summary
from dit_runtime.console import guarded, printable
from dit_runtime.errors import UsageError
from dit_runtime.facts import LIMITS
from dit_runtime.options import Parser, add_bundle, add_size, add_version, load_bundle
from dit_runtime.progress import Progress

ACTIONS = {"info": f"of at most {LIMITS['cache_bytes'] / 1e9:.1f} GB", "clear": "removed"}  # of `cache`


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded("dit-run", _main, arguments)


def _main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _parser() -> Parser:
    parser = Parser(prog="dit-run", description="Sample from a bundle with NumPy and one engine.")
    add_version(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    drawing = commands.add_parser("sample", help="pictures from prompts, class names or numbers, or from arrays")
    sample.add_options(drawing)
    drawing.set_defaults(command=sample.run)

    info = commands.add_parser("info", help="what a bundle holds, and which backends are here")
    info.add_argument("bundle", type=Path, nargs="?")
    info.add_argument("--json", action="store_true")
    info.set_defaults(command=_info)

    check = commands.add_parser("verify", help="replay PyTorch's reference with the engines here")
    add_bundle(check)
    check.set_defaults(command=_verify)

    compiling = commands.add_parser("compile", help="make engines from the bundle's ONNX on this machine, then verify")
    add_bundle(compiling)
    compiling.add_argument("--backend", default="auto", help=f"auto, {', '.join(backends.BACKENDS)}")
    add_tuning(compiling)
    compiling.set_defaults(command=_compile)

    kept = commands.add_parser("cache", help="compiled engines and kernels that backends keep on this machine")
    kept.add_argument("action", choices=ACTIONS, help="info: the number and size of its entries; clear: remove all")
    kept.set_defaults(command=_cache)

    timing = commands.add_parser("bench", help="time each stage and a whole picture")
    add_bundle(timing)
    add_size(timing)
    timing.add_argument("--batch", type=int, default=1)
    timing.add_argument("--preset", help="of the bundle; default: none")
    timing.add_argument("--steps", type=int, help="default: the bundle's")
    timing.add_argument("--rounds", type=int, default=7)
    timing.set_defaults(command=_bench)
    return parser


def add_tuning(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TensorRT", "options of TensorRT's builder, under its own names")
    group.add_argument("--compute-capability", nargs="+", metavar="8.9", help="GPUs to compile for; default: all known")
    group.add_argument("--builder-optimization-level", type=int, metavar="0-5")
    group.add_argument("--pool-limit", nargs="+", metavar="workspace:4G")
    group.add_argument(
        "--version-compatible", action="store_true", default=None, help="engines that later versions open too"
    )
    group.add_argument("--hardware-compatibility-level", metavar="ampere+", help="none, ampere+, sameComputeCapability")
    group.add_argument("--weight-streaming", action="store_true", default=None, help="weights larger than GPU memory")
    group.add_argument("--strip-plan", action="store_true", default=None, help="leave the weights in the ONNX files")
    group.add_argument("--refittable", action="store_true", default=None)
    group.add_argument("--timing-cache", metavar="FILE", help="read at the start, written at the end")


def tuning(options: argparse.Namespace) -> Tuning:
    chosen = {field.name: getattr(options, field.name) for field in fields(Tuning)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()
    }
    return replace(Tuning(), **{name: value for name, value in values.items() if value is not None})


def _info(options: argparse.Namespace) -> int:
    table: dict[str, Any] = {"backends": backends.versions()}
    contract = manifest.read(options.bundle) if options.bundle else None
    if contract:
        table["bundle"] = json.loads(contract.to_json())
    if options.json:
        print(json.dumps(table, indent=1))
        return 0
    if contract:
        print(printable(summary(options.bundle, contract)))
    for name, version in table["backends"].items():
        hint = f"not installed: pip install 'dit-runtime[{name}]'"
        reason = backends.backend(name).why_unavailable() if version else None
        state = f"{version}, and cannot run here: {reason}" if reason else version
        print(f"backend {name}: {state or hint}")
    return 0


def _cache(options: argparse.Namespace) -> int:
    own = cache.root()
    if own is None or not own.is_dir() or not cache.is_own(own):
        print("the cache is empty" if own is None or not own.exists() else f"{own}: not this user's own, and not used")
        return 0
    known = list(cache.entries(own)) if options.action == "info" else cache.prune(own, 0)
    size = sum(entry.size for entry in known) / 1e6
    print(f"{own}: {len(known)} entries, {size:.1f} MB {ACTIONS[options.action]}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    return report(_figures(options), options.json)


def _figures(options: argparse.Namespace) -> list[verify.Figure]:
    progress = Progress()
    with load_bundle(options) as pipe:
        figures = verify.verify(pipe, lambda done, total: progress.step(done, total, "verify"))
    progress.end()
    return figures


def report(figures: list[verify.Figure], as_json: bool) -> int:
    """Print the table or JSON; the exit code is 1 when a gate failed."""
    passed = all(figure.passed for figure in figures)
    if as_json:
        print(json.dumps({"passed": passed, "checks": [figure.to_dict() for figure in figures]}, indent=1))
    else:
        print(printable(verify.table(figures)))
        print("verified" if passed else "FAILED: these engines do not draw PyTorch's pictures")
    return 0 if passed else 1


def _compile(options: argparse.Namespace) -> int:
    folder = options.bundle
    contract = manifest.read(folder, engines=False)
    for stage in contract.stages if options.provider else ():
        name = backends.choose(options.backend, stage.precision)
        if reason := backends.refusal(name, stage.precision, options.provider):
            raise UsageError(reason)
    settings = Options(options.threads, options.provider, tuning=tuning(options))
    compiled = compile_stages(folder, contract, options.backend, settings, Progress())
    code = 1
    try:
        manifest.write(folder, compiled)
        if reason := why_unavailable(compiled, options.provider):
            code = 0
            if options.json:
                print(json.dumps({"passed": None, "reason": reason}))
            else:
                print(
                    f"compiled and not verified: {reason}; on the target: dit-run verify {folder}{provider(compiled)}"
                )
        else:
            figures = _figures(options)
            code = report(figures, options.json)
            for size, own in verify.by_size(compiled, figures).items():
                sized = compiled.at(size)
                parity = verify.summary(sized.parity.get("proof", "none"), own)
                sized = replace(sized, parity=parity, batch_invariant=verify.batch_invariant(sized, own))
                compiled = sized.at(compiled.size)
    finally:  # engines that fail do not stay, and only those that do not are put in the place of others
        stays, goes = (contract, compiled) if code else (compiled, contract)
        try:
            manifest.write(folder, stays)
        finally:  # on a full disk too
            remove(folder, goes.files.keys() - stays.files.keys())
    return code


def _bench(options: argparse.Namespace) -> int:
    with load_bundle(options, options.size) as pipe:
        rows = bench.measure(pipe, options.batch, options.steps, options.rounds, Progress(), options.preset)
    print(json.dumps([row._asdict() for row in rows], indent=1) if options.json else printable(bench.table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
