"""`dit-export bench`: its options, and what is printed of its results."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from dit_export.bench import chart, report
from dit_export.bench.competitors import COMPETITORS
from dit_export.bench.run import Settings, bench
from dit_export.bundle.presets import read_presets
from dit_export.networks.spec import MODELS, at_resolution, model
from dit_runtime.console import answer
from dit_runtime.errors import UsageError
from dit_runtime.facts import DEFAULT_STEPS
from dit_runtime.files import write_file
from dit_runtime.options import Known, Parser
from dit_runtime.progress import Progress
from dit_runtime.sampling.process import Process

DEMO = Path(__file__).parents[1] / "demo" / "model" / "presets.json"


def add_options(parser: Parser) -> None:
    text = f"{', '.join(MODELS)}; default: S/2"
    parser.add_argument("model", nargs="?", default="S/2", type=Known(MODELS), metavar="MODEL", help=text)
    add = parser.add_argument_group("work").add_argument
    add("--resolution", type=int, default=256, metavar="N", help="pixels along a side; default: 256")
    add("--batch", type=int, default=1, metavar="N", help="pictures in a batch; default: 1")
    add("--steps", type=int, default=DEFAULT_STEPS, metavar="N", help=f"steps of an image; default: {DEFAULT_STEPS}")
    add("--rounds", type=int, default=7, metavar="N", help="measurements of each contender, interleaved; default: 7")
    text = "whole images to time; 0: derive the time from a step's; default: 1, or 0 on a CPU that takes long"
    add("--images", type=int, metavar="N", help=text)
    text = "presets of `dit-export tune` to time; default: the demo's"
    add("--presets", type=Path, metavar="FILE.json", help=text)
    add = parser.add_argument_group("contenders").add_argument
    names = tuple(COMPETITORS)
    text = f"{', '.join(names)}; each has contenders of its own; default: cpu"
    add("--device", type=Known(names), default="cpu", metavar="NAME", help=text)
    text = 'time only these names or patterns, such as compile-bf16 or "ours-*"; default: all'
    add("--only", nargs="+", default=(), metavar="NAME", help=text)
    add("--threads", type=int, metavar="N", help="threads of each contender; default: all cores")
    text = "limit in GB for all contenders together; default: 90 %% of free memory"
    add("--memory", type=float, metavar="X", help=text)
    add = parser.add_argument_group("output").add_argument
    add("--results", type=Path, metavar="FILE.json", help="write all measurements")
    add("--svg", type=Path, metavar="FILE.svg", help="write a bar chart of the steps' times")
    add("-o", "--output", type=Path, metavar="FOLDER", help="where to keep the models while it runs")


def run(options: argparse.Namespace) -> int:
    """Exit code 1 where a floor is above a measurement, or a competitor computes something else."""
    folders = [path.parent for path in (options.results, options.svg) if path] + [options.output or Path()]
    for folder in folders:  # before the long work
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
    presets = options.presets or (DEMO if DEMO.is_file() else None)
    settings = Settings(
        spec=at_resolution(model(options.model), options.resolution),
        memory=None if options.memory is None else 1e9 * options.memory,
        folder=options.output,
        presets=read_presets(presets, Process()) if presets else {},
        **{key: getattr(options, key) for key in ("device", "batch", "steps", "rounds", "images", "threads", "only")},
    )
    result = {"command": shlex.join(["dit-export", *sys.argv[1:]]), **bench(settings, Progress(quiet=options.quiet))}
    if options.results:
        write_file(options.results, json.dumps(result, indent=1) + "\n")
    if options.svg:
        write_file(options.svg, chart.svg(result))
    answer(options, result, report.table(result))
    return int(bool(result["problems"]))
