"""`dit-run`: sample, info, verify, compile and bench a bundle, with NumPy and one engine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dit_runtime import advice, backends, bench, cache, completion, sample, verify
from dit_runtime.backends import Options, Tuning
from dit_runtime.bundle import manifest, signature
from dit_runtime.bundle.compiling import compile_stages, provider, remove, why_unavailable
from dit_runtime.bundle.summary import summary
from dit_runtime.console import answer, guarded
from dit_runtime.errors import UsageError
from dit_runtime.facts import LIMITS
from dit_runtime.options import (
    Command,
    Known,
    Parser,
    add_bundle,
    add_commands,
    add_engine,
    add_public_key,
    add_size,
    add_version,
    load_bundle,
)
from dit_runtime.progress import Progress

ACTIONS = {"info": f"of at most {LIMITS['cache_bytes'] / 1e9:.1f} GB", "clear": "removed"}  # of `cache`


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded("dit-run", _main, arguments)


def _main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def parser() -> Parser:
    program = Parser(prog="dit-run", description="Draw pictures from a bundle with NumPy and one engine.")
    add_version(program)
    return add_commands(program, COMMANDS)


def _info_options(parser: Parser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="folder with a manifest.json")
    add_public_key(parser.add_argument_group("safety").add_argument)


def _verify_options(parser: Parser) -> None:
    add_bundle(parser)
    add_engine(parser)
    add_public_key(parser.add_argument_group("safety").add_argument)


def _compile_options(parser: Parser) -> None:
    add_bundle(parser)
    add_engine(parser)
    add_public_key(parser.add_argument_group("safety").add_argument)
    add_backend(parser.add_argument_group("backend"), default="auto")
    add_tuning(parser)


def _cache_options(parser: Parser) -> None:
    parser.add_argument(
        "action", choices=ACTIONS, metavar="ACTION", help="info: the number and size of its entries; clear: remove all"
    )


def _bench_options(parser: Parser) -> None:
    add_bundle(parser)
    add_engine(parser)
    add_public_key(parser.add_argument_group("safety").add_argument)
    group = parser.add_argument_group("request")
    add_size(group)
    group.add_argument("--batch", type=int, default=1, metavar="N", help="pictures in a batch; default: 1")
    group.add_argument("--preset", metavar="NAME", help="a preset of the bundle; default: none")
    group.add_argument("--steps", type=int, metavar="N", help="steps of a run; default: the bundle's")
    group.add_argument("--rounds", type=int, default=7, metavar="N", help="measurements of each stage; default: 7")


def add_backend(group: Any, default: str | None = None) -> None:
    names = ("auto", *backends.BACKENDS)
    text = f"{', '.join(names)}; default: auto, the fastest that is installed"
    group.add_argument("--backend", type=Known(names), default=default, metavar="NAME", help=text)


def add_tuning(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TensorRT", "Options of TensorRT's builder, under its own names.")
    add = group.add_argument
    add("--compute-capability", nargs="+", metavar="X", help="GPUs to compile for, such as 8.9; default: all known")
    add("--builder-optimization-level", type=int, metavar="N", help="0 to 5: more is slower to compile")
    add("--pool-limit", nargs="+", metavar="NAME:N", help="memory of the builder, such as workspace:4G")
    add("--version-compatible", action="store_true", default=None, help="make engines that later versions open too")
    levels = ("none", "ampere+", "sameComputeCapability")
    add("--hardware-compatibility-level", type=Known(levels), metavar="NAME", help=", ".join(levels))
    add("--weight-streaming", action="store_true", default=None, help="for weights that are larger than GPU memory")
    add("--strip-plan", action="store_true", default=None, help="leave the weights in the ONNX files")
    add("--refittable", action="store_true", default=None, help="make engines whose weights can be replaced")
    add("--timing-cache", metavar="FILE", help="file that is read at the start and written at the end")


def tuning(options: argparse.Namespace) -> Tuning:
    chosen = {field.name: getattr(options, field.name) for field in fields(Tuning)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()
    }
    return replace(Tuning(), **{name: value for name, value in values.items() if value is not None})


def _info(options: argparse.Namespace) -> int:
    table: dict[str, Any] = {"backends": backends.versions()}
    contract = manifest.read(options.bundle, public_key=options.public_key) if options.bundle else None
    lines = []
    if contract:
        table["bundle"] = json.loads(contract.to_json())
        table["signed_by"] = signature.describe(options.bundle, manifest.read_content(options.bundle))[0] or None
        lines.append(summary(options.bundle, contract))
    for name, version in table["backends"].items():
        hint = f"not installed: pip install 'dit-runtime[{name}]'"
        reason = backends.backend(name).why_unavailable() if version else None
        state = f"{version}, and cannot run here: {reason}" if reason else version
        lines.append(f"backend {name}: {state or hint}")
    answer(options, table, "\n".join(lines))
    return 0


def _cache(options: argparse.Namespace) -> int:
    own = cache.root()
    if own is None or not own.is_dir() or not cache.is_own(own):
        text = "the cache is empty" if own is None or not own.exists() else f"{own}: not this user's own, and not used"
        answer(options, {"folder": None if own is None else str(own), "entries": 0, "bytes": 0}, text)
        return 0
    known = list(cache.entries(own)) if options.action == "info" else cache.prune(own, 0)
    size = sum(entry.size for entry in known)
    text = f"{own}: {len(known)} entries, {size / 1e6:.1f} MB {ACTIONS[options.action]}"
    answer(options, {"folder": str(own), "entries": len(known), "bytes": size}, text)
    return 0


def _verify(options: argparse.Namespace) -> int:
    figures = _figures(options)
    if all(figure.passed for figure in figures):
        return report(options, figures)
    return report(options, figures, advice.after_verify(options, manifest.read(options.bundle), figures))


def _figures(options: argparse.Namespace) -> list[verify.Figure]:
    progress = Progress(quiet=options.quiet)
    with load_bundle(options) as pipe:
        figures = verify.verify(pipe, lambda done, total: progress.step(done, total, "verify"))
    progress.end()
    return figures


def report(options: argparse.Namespace, figures: list[verify.Figure], commands: Sequence[str] = ()) -> int:
    """Print the table or JSON, and where a gate failed the next commands; the exit code is 1 then."""
    if all(figure.passed for figure in figures):
        table = {"passed": True, "checks": [figure.to_dict() for figure in figures]}
        answer(options, table, f"{verify.table(figures)}\nverified", brief="")
        return 0
    table = {"passed": False, "checks": [figure.to_dict() for figure in figures], "next": [*commands]}
    verdict = ["FAILED: these engines do not draw PyTorch's pictures", *advice.lines(commands)]
    failed = [figure for figure in figures if not figure.passed]
    brief = "\n".join([verify.table(failed), *verdict])
    answer(options, table, "\n".join([verify.table(figures), *verdict]), brief)
    return 1


def _compile(options: argparse.Namespace) -> int:
    folder = options.bundle
    contract = manifest.read(folder, engines=False, public_key=options.public_key)
    options.public_key = None  # which signed the manifest that is replaced
    for stage in contract.stages if options.provider else ():
        name = backends.choose(options.backend, stage.precision)
        if reason := backends.refusal(name, stage.precision, options.provider):
            raise UsageError(reason)
    settings = Options(options.threads, options.provider, tuning=tuning(options))
    compiled = compile_stages(folder, contract, options.backend, settings, Progress(quiet=options.quiet))
    passed, figures = False, None
    try:
        manifest.write(folder, compiled)
        reason = why_unavailable(compiled, options.provider)
        if not reason:
            figures = _figures(options)
            for size, own in verify.by_size(compiled, figures).items():
                sized = compiled.at(size)
                parity = verify.summary(sized.parity.get("proof", "none"), own)
                sized = replace(sized, parity=parity, batch_invariant=verify.batch_invariant(sized, own))
                compiled = sized.at(compiled.size)
        passed = figures is None or all(figure.passed for figure in figures)
    finally:  # engines that fail do not stay, and only those that do not are put in the place of others
        stays, goes = (compiled, contract) if passed else (contract, compiled)
        try:
            manifest.write(folder, stays)
        finally:  # on a full disk too
            remove(folder, goes.files.keys() - stays.files.keys())
    if figures is None:
        there = f"dit-run verify {folder}{provider(compiled)}"
        text = f"compiled and not verified: {reason}; on the target: {there}"
        answer(options, {"passed": None, "reason": reason, "next": [there]}, text)
        return 0
    return report(options, figures, [] if passed else advice.after_compile(options, compiled))


def _bench(options: argparse.Namespace) -> int:
    progress = Progress(quiet=options.quiet)
    with load_bundle(options, options.size) as pipe:
        rows = bench.measure(pipe, options.batch, options.steps, options.rounds, progress, options.preset)
    answer(options, {"timings": [row._asdict() for row in rows]}, bench.table(rows))
    return 0


COMMANDS = {
    "draw": [
        Command(
            "sample",
            "draw pictures from prompts, labels or arrays",
            sample.add_options,
            sample.run,
            (
                "sample BUNDLE --labels 207 360 --seed 42 -o sample.png",
                'sample BUNDLE --prompt "a photo of a cat" --negative blurry --steps 20 -o cat.png',
                "sample BUNDLE --count 50000 --shards samples --seed 1  # goes on where it was stopped",
            ),
        )
    ],
    "prove": [
        Command(
            "verify",
            "replay PyTorch's reference run with the engines here",
            _verify_options,
            _verify,
            ("verify BUNDLE", "verify BUNDLE --provider cuda --json"),
        )
    ],
    "look": [
        Command(
            "info",
            "show what a bundle holds, and which backends are here",
            _info_options,
            _info,
            ("info BUNDLE", "info  # the backends alone"),
        ),
        Command(
            "bench",
            "time each stage and a whole picture",
            _bench_options,
            _bench,
            ("bench BUNDLE --batch 4 --steps 25", "bench BUNDLE --preset fast --json"),
        ),
    ],
    "prepare": [
        Command(
            "compile",
            "make engines from a bundle's ONNX on this machine, then verify",
            _compile_options,
            _compile,
            ("compile BUNDLE --backend openvino", "compile BUNDLE --backend tensorrt --compute-capability 8.9"),
        ),
        Command(
            "cache",
            "show or remove compiled files that backends keep on this machine",
            _cache_options,
            _cache,
            ("cache info", "cache clear"),
        ),
        completion.COMMAND,
    ],
}


if __name__ == "__main__":
    sys.exit(main())
