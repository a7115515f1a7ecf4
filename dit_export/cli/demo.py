"""`dit-export demo`: the small DiT that ships, trained, built, sampled and judged."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dit_export.cli.console import dit_run, report_checks
from dit_runtime.errors import UsageError
from dit_runtime.progress import Progress
from dit_runtime.verify import table


def add(commands: Any) -> None:
    parser = commands.add_parser("demo", help="a small DiT on synthetic pictures of shapes: train, build, score")
    parts = parser.add_subparsers(required=True, metavar="PART")
    train = parts.add_parser("train", help="autoencoder, judge and DiT from nothing, about two hours; resumes")
    train.add_argument("output", type=Path, metavar="DIR", help="folder for the weights, as diffusers lays it out")
    train.set_defaults(command=_train)
    train_sr = parts.add_parser("train-sr", help="super-resolution from its DiT, about half an hour; resumes")
    train_sr.add_argument("folder", type=Path, metavar="DIR", help="of the weights, for its sr/")
    train_sr.set_defaults(command=_train_sr)
    for part in (train, train_sr):
        part.add_argument("--seed", type=int, default=0)
        part.add_argument(
            "--no-resume", dest="resume", action="store_false", help="start again, without an earlier run's state"
        )
    show = parts.add_parser("show", help="build and verify it in fp32 and int8, draw grids, score them with the judge")
    show.set_defaults(command=_show)
    show_sr = parts.add_parser(
        "show-sr", help="super-resolution from 16 to 64 pixels; score it and bicubic with the judge"
    )
    show_sr.set_defaults(command=_show_sr)
    for part in (show, show_sr):
        part.add_argument("-o", "--output", type=Path, metavar="DIR", help="of the bundles; default: engines/build")
    score = parts.add_parser("score", help="score a bundle of it and PyTorch with the judge")
    score.add_argument("bundle", type=Path)
    score.set_defaults(command=_score)
    for part, count in ((show, 400), (show_sr, 400), (score, 1000)):
        part.add_argument("--count", type=int, default=count, help=f"pictures to score; default: {count}")
        part.add_argument("--json", action="store_true")
    judge = parts.add_parser("judge", help="the judge as ONNX, to score without PyTorch")
    judge.add_argument("output", type=Path, metavar="FILE.onnx")
    judge.set_defaults(command=_judge)
    for part in (show, show_sr, score, judge):
        part.add_argument("--weights", type=Path, metavar="DIR", help="what `demo train` wrote; default: what ships")


def _show(options: argparse.Namespace) -> int:
    from dit_export.demo import run

    shown = run.demo(options.weights, options.output or run.FOLDER, _count(options), Progress())
    scores = {sheet.name: sheet.score for sheet in shown}
    code = int(not all(sheet.built.passed for sheet in shown))
    if options.json:
        print(run.to_json(scores))
        return code
    for sheet in shown:
        print(f"{sheet.name}:")
        report_checks(sheet.built, as_json=False)
    print(run.table(scores))
    for sheet in shown:
        print(f"{sheet.name}: grid {sheet.grid}, report {sheet.built.folder}/report.html")
    print(f'sample: {dit_run()} sample {shown[-1].built.folder} --labels "red circle" "blue star"')
    return code


def _show_sr(options: argparse.Namespace) -> int:
    from dit_export.demo import run, run_sr

    shown = run_sr.show(options.weights, options.output or run.FOLDER, _count(options), Progress())
    if options.json:
        print(run_sr.to_json(shown))
        return int(not shown.passed)
    for name, built in shown.built.items():
        print(f"{name}:")
        report_checks(built, as_json=False)
    print(f"{run_sr.table(shown.rows)}\n{table(shown.verdict)}\nlow, bicubic, drawn and true: {shown.grid}")
    return int(not shown.passed)


def _score(options: argparse.Namespace) -> int:
    from dit_export.demo import run

    scores = run.compare(options.weights, options.bundle, _count(options), Progress())
    print(run.to_json(scores) if options.json else run.table(scores))
    return 0


def _count(options: argparse.Namespace) -> int:
    if options.count < 100:
        raise UsageError(f"count {options.count}; expected at least 100, for a distance between distributions")
    return int(options.count)


def _train(options: argparse.Namespace) -> int:
    from dit_export.demo import card
    from dit_export.demo.train import train

    train(options.output, seed=options.seed, resume=options.resume)
    card.write(options.output)
    return 0


def _train_sr(options: argparse.Namespace) -> int:
    from dit_export.demo import store
    from dit_export.demo.run import present
    from dit_export.demo.train_sr import train

    folder = present(options.folder)
    train(folder / store.SR, folder, seed=options.seed, resume=options.resume)
    return 0


def _judge(options: argparse.Namespace) -> int:
    from dit_export.demo.run import export_judge

    export_judge(options.weights, options.output)
    print(options.output)
    return 0
