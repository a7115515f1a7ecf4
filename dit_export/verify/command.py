"""`dit-export verify` and its alias `regress`: their options, and what is printed of the results."""

from __future__ import annotations

import argparse
from pathlib import Path

from dit_runtime.advice import lines as next_lines
from dit_runtime.bundle import manifest
from dit_runtime.console import answer, note
from dit_runtime.errors import UsageError
from dit_runtime.files import write_file
from dit_runtime.options import Parser, add_bundle, add_engine, add_size
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


def add_options(parser: Parser, weights: bool = True) -> None:
    """Give the parser the options of the gate.

    Without `weights`, as for `regress`, the truth is reference.npz, and PyTorch is not asked again.
    """
    add_bundle(parser)
    parser.set_defaults(weights=weights)
    group = parser.add_argument_group("what is compared")
    add_size(group, "default: all, or the first with --baseline, --against, a judge, a file to write or --json")
    add = group.add_argument
    if weights:
        text = "compare with reference.npz alone; the default with --baseline, --against and --samples"
        add("--no-weights", dest="weights", action="store_false", help=text)
    add("--baseline", type=Path, metavar="FILE.json", help="the figures of an earlier build, with their limits")
    add("--update-baseline", action="store_true", help="write the baseline from this bundle's figures")
    text = "another bundle of the same network, taken as correct: the first tensor that differs is named"
    add("--against", type=Path, metavar="BUNDLE", help=text)
    add = parser.add_argument_group("judge", "A network that scores many pictures; a bundle may hold one.").add_argument
    add("--features", type=Path, metavar="FILE.onnx", help="another judge: a network with an image input")
    add("--real", type=Path, metavar="FILE.npz", help="real pictures, their features, or mu and sigma")
    add("--samples", type=Path, metavar="FILE.npz", help="score these pictures or features; draw none")
    add("--count", type=int, metavar="N", help="pictures to draw; default, with --features or --real: 2000")
    add_engine(parser)
    add = parser.add_argument_group("output").add_argument
    add("--report", type=Path, metavar="FILE.html", help="the figures, pictures and curves as one page")
    add("--junit", type=Path, metavar="FILE.xml", help="the figures as JUnit XML")


def run(options: argparse.Namespace) -> int:
    names = manifest.read(options.bundle).size_names
    alone = any(getattr(options, name) for name in ONE_SIZE)
    if options.size is None and alone and len(names) > 1:
        note(options, f"only the size {names[0]} is checked; --size names another one")
    if options.size is not None or alone or len(names) < 2:
        return _run(options)
    codes = []
    for options.size in names:
        if not options.quiet:
            print(f"size {options.size}:", flush=True)
        codes.append(_run(options))
    return max(codes)


def _run(options: argparse.Namespace) -> int:
    from dit_export.verify import advice, junit, report
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
    progress = Progress(quiet=options.quiet)
    result = gate(settings, progress)
    progress.end()
    name = options.bundle.resolve().name
    if options.junit:
        write_file(options.junit, junit.xml(name, result.checks, result.located))
    if options.report:
        report.write(options.report, options.bundle, report.page_of_gate(name, result))
    if not result.sensitive:
        note(options, insensitive(options.bundle, result.proof))
    commands = advice.after_gate(options, result)
    failed = [figure for figure in result.checks if not figure.passed]
    if result.first is None:
        lines = brief = [f"baseline: {options.baseline}"] if options.update_baseline else ["verified"]
        brief = brief if options.update_baseline else []
    else:
        lines = [f"FAILED {sentence(result.first)}", *result.located]
        if options.update_baseline:
            lines.append(f"{options.baseline} is not written: what fails already is no baseline")
        lines += next_lines(commands)
        brief = [table(failed), *lines]
    answer(options, {**result.to_dict(), "next": commands}, "\n".join([table(result.checks), *lines]), "\n".join(brief))
    return int(not result.passed)
