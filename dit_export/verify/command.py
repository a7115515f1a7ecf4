"""`dit-export verify` and its alias `regress`: their options, and where the results go."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from dit_runtime.files import write_file
from dit_runtime.progress import Progress

ONE_SIZE = (
    "baseline",
    "against",
    "features",
    "real",
    "samples",
    "count",
    "junit",
    "report",
    "json",
)  # what looks at one


def add_options(parser: argparse.ArgumentParser, weights: bool = True) -> Callable[[argparse.Namespace], int]:
    """Give the parser the options of the gate; return the function that runs it.

    Without `weights`, as for `regress`, the truth is reference.npz, and PyTorch is not asked again.
    """
    parser.add_argument("bundle", type=Path, help="folder with a manifest.json")
    parser.add_argument(
        "--size", help="one of the bundle's; default: each, or the first with options for a single size"
    )
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="limits from an earlier build, JSON to commit")
    parser.add_argument("--update-baseline", action="store_true", help="write the baseline from this bundle's figures")
    parser.add_argument(
        "--against", type=Path, metavar="BUNDLE", help="a correct bundle of the same network, drawn with the same seeds"
    )
    parser.add_argument("--features", type=Path, metavar="FILE.onnx", help="the judge: a network with an image input")
    parser.add_argument("--real", type=Path, metavar="FILE.npz", help="real pictures, their features, or mu and sigma")
    parser.add_argument("--samples", type=Path, metavar="FILE.npz", help="score these pictures or features; draw none")
    parser.add_argument(
        "--count", type=int, metavar="N", help="pictures to draw for the judge; default, with a judge: 2000"
    )
    parser.add_argument("--threads", type=int, help="of the engine; default: its own choice")
    parser.add_argument("--provider", help="ONNX Runtime's execution provider: cpu, cuda, cuda:N")
    parser.add_argument("--low-memory", action="store_true", help="open one stage at a time")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="the figures as JUnit XML")
    parser.add_argument("--report", type=Path, metavar="FILE", help="the figures, pictures and curves as one HTML page")
    parser.add_argument("--json", action="store_true", help="for machines, on standard output")
    if weights:
        text = "compare with reference.npz alone; the default with --baseline, --against and --samples"
        parser.add_argument("--no-weights", dest="weights", action="store_false", help=text)
    parser.set_defaults(weights=weights)
    return run


def run(options: argparse.Namespace) -> int:
    names = manifest.read(options.bundle).size_names
    alone = any(getattr(options, name) for name in ONE_SIZE)
    if options.size is None and alone and len(names) > 1:
        print(f"only the size {names[0]} is checked; --size names another one", file=sys.stderr)
    if options.size is not None or alone or len(names) < 2:
        return _run(options)
    codes = []
    for options.size in names:
        print(f"size {options.size}:", flush=True)
        codes.append(_run(options))
    return max(codes)


def _run(options: argparse.Namespace) -> int:
    from dit_export.verify import junit, report
    from dit_export.verify.gate import Settings, gate
    from dit_export.verify.metrics import insensitive, sentence
    from dit_runtime.verify import table

    if options.update_baseline and options.baseline is None:
        raise UsageError("--update-baseline needs the file to write: pass --baseline FILE")
    for path in (options.baseline, options.junit, options.report):  # before the long work
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: the folder {path.parent} does not exist")
    if options.report:
        report.require_place(options.report, options.bundle)
    names = ("bundle", "size", "baseline", "against", "features", "real", "samples", "count", "threads", "provider")
    values = {name: getattr(options, name) for name in (*names, "low_memory")}
    other_truth = options.baseline or options.against or options.samples
    settings = Settings(weights=options.weights and not other_truth, update=options.update_baseline, **values)
    progress = Progress()
    result = gate(settings, progress)
    progress.end()
    name = options.bundle.resolve().name
    if options.junit:
        write_file(options.junit, junit.xml(name, result.checks, result.located))
    if options.report:
        report.write(options.report, options.bundle, report.page_of_gate(name, result))
    if not result.sensitive:
        print(insensitive(options.bundle, result.proof), file=sys.stderr)
    if options.json:
        print(json.dumps(result.to_dict(), indent=1, ensure_ascii=False, allow_nan=False))
        return int(not result.passed)
    print(table(result.checks))
    if result.first is None:
        print(f"baseline: {options.baseline}" if options.update_baseline else "verified")
        return 0
    print(f"FAILED {sentence(result.first)}")
    for line in result.located:
        print(line)
    if options.update_baseline:
        print(f"{options.baseline} is not written: what fails already is no baseline")
    return 1
