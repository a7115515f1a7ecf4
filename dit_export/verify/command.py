"""`dit-export regress`: its options, and where its results go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from dit_runtime.errors import UsageError
from dit_runtime.progress import Progress


def add_options(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Gives the parser its options, and the command that takes them."""
    parser.add_argument("bundle", type=Path, help="folder with a manifest.json")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="limits from an earlier build, JSON to commit")
    parser.add_argument("--update-baseline", action="store_true", help="write the baseline from this bundle's figures")
    parser.add_argument("--against", type=Path, metavar="BUNDLE", help="one that is right: same seeds, same blocks")
    parser.add_argument(
        "--features", type=Path, metavar="FILE.onnx", help="a network with an image input, as the judge"
    )
    parser.add_argument("--real", type=Path, metavar="FILE.npz", help="real pictures, their features, or mu and sigma")
    parser.add_argument("--samples", type=Path, metavar="FILE.npz", help="judge these pictures or features, draw none")
    parser.add_argument("--count", type=int, metavar="N", help="pictures to draw for the judge; default with one: 2000")
    parser.add_argument("--threads", type=int, help="of the engine; default: its own choice")
    parser.add_argument("--provider", help="ONNX Runtime's execution provider: cpu, cuda")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="the figures as JUnit XML")
    parser.add_argument("--report", type=Path, metavar="FILE", help="the figures, pictures and curves as one HTML page")
    parser.add_argument("--json", action="store_true", help="for machines, on standard output")
    return run


def run(options: argparse.Namespace) -> int:
    from dit_export.verify import junit, report
    from dit_export.verify.metrics import table
    from dit_export.verify.regress import Settings, regress

    if options.update_baseline and options.baseline is None:
        raise UsageError("--update-baseline needs the file to write: pass --baseline FILE")
    for path in (options.baseline, options.junit, options.report):  # before the long work
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: the folder {path.parent} does not exist")
    if options.report:
        report.require_place(options.report, options.bundle)
    names = ("bundle", "baseline", "against", "features", "real", "samples", "count", "threads", "provider")
    settings = Settings(update=options.update_baseline, **{name: getattr(options, name) for name in names})
    progress = Progress()
    result = regress(settings, progress)
    progress.end()
    name = options.bundle.resolve().name
    if options.junit:
        options.junit.write_text(junit.xml(name, result.metrics, result.located), encoding="utf-8")
    if options.report:
        report.write(options.report, options.bundle, report.of(name, result))
    if options.json:
        print(json.dumps(result.to_dict(), indent=1, ensure_ascii=False, allow_nan=False))
        return int(not result.passed)
    print(table(result.metrics))
    if result.first is None:
        print(f"baseline: {options.baseline}" if options.update_baseline else "no regression")
        return 0
    print(f"FAILED {result.first}")
    for sentence in result.located:
        print(sentence)
    if options.update_baseline:
        print(f"{options.baseline} is not written: what fails already is no baseline")
    return 1
