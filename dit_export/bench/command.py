"""`dit-export bench`: its options, and where its results go."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from dit_export.bench import chart, report
from dit_export.bench.competitors import COMPETITORS
from dit_export.bench.run import Settings, bench
from dit_export.bundle.presets import read_presets
from dit_export.networks.spec import MODELS, at_resolution, model
from dit_runtime.errors import UsageError
from dit_runtime.facts import DEFAULT_STEPS
from dit_runtime.files import write_file
from dit_runtime.progress import Progress
from dit_runtime.sampling.process import Process

DEMO = Path(__file__).parents[1] / "demo" / "model" / "presets.json"


def add_options(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Gives the parser its options, and the command that takes them."""
    parser.add_argument("model", nargs="?", default="S/2", help=f"{', '.join(MODELS)}; default: S/2")
    parser.add_argument("--device", default="cpu", help=f"{', '.join(COMPETITORS)}; each has its own competitors")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1, help="pictures at a time")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="of an image")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, each with all competitors")
    parser.add_argument(
        "--images",
        type=int,
        help="whole images of each to time; 0: derive the time; default: 1, or 0 on a CPU that takes long",
    )
    parser.add_argument("--threads", type=int, help="of each competitor; default: all cores")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help='such as compile-bf16 or "ours-*"')
    parser.add_argument(
        "--memory", type=float, metavar="GB", help="limit for all competitors together; default: 90 %% of free memory"
    )
    parser.add_argument(
        "--presets", type=Path, metavar="FILE.json", help="presets of `dit-export tune` to time; default: the demo's"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="everything that was measured")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="a bar chart of the steps")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder for the models while it runs")
    return run


def run(options: argparse.Namespace) -> int:
    """Exit code 1 where a floor is above a measurement, or a competitor computes something else."""
    folders = [path.parent for path in (options.json, options.svg) if path] + [options.output or Path()]
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
    result = {"command": shlex.join(["dit-export", *sys.argv[1:]]), **bench(settings, Progress())}
    if options.json:
        write_file(options.json, json.dumps(result, indent=1) + "\n")
    if options.svg:
        write_file(options.svg, chart.svg(result))
    print(report.table(result))
    return int(bool(result["problems"]))
