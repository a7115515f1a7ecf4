"""`dit-export demo`: the small DiT that ships, trained, built, sampled and judged."""

from __future__ import annotations

import argparse
from pathlib import Path

from dit_export.cli.console import dit_run, verdict
from dit_runtime.console import answer
from dit_runtime.errors import UsageError
from dit_runtime.options import Command, Parser, add_bundle
from dit_runtime.progress import Progress
from dit_runtime.verify import table


def _add_weights(parser: Parser) -> None:
    group = parser.add_argument_group("weights")
    text = "what `demo train` wrote; default: the weights that ship"
    group.add_argument("--weights", type=Path, metavar="FOLDER", help=text)


def _add_count(parser: Parser, count: int) -> None:
    _add_weights(parser)
    group = parser.add_argument_group("score")
    group.add_argument("--count", type=int, default=count, metavar="N", help=f"pictures to score; default: {count}")


def _add_training(parser: Parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weights and data; default: 0")
    text = "start again, without the state of an earlier run"
    group.add_argument("--no-resume", dest="resume", action="store_false", help=text)


def _train_options(parser: Parser) -> None:
    parser.add_argument("output", type=Path, metavar="FOLDER", help="folder for the weights, in diffusers' layout")
    _add_training(parser)


def _train_sr_options(parser: Parser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="folder of the demo's weights; the new ones go to sr/ in it"
    )
    _add_training(parser)


def _show_options(parser: Parser) -> None:
    _add_count(parser, 400)
    group = parser.add_argument_group("output")
    text = "folder for the bundles; default: engines/build"
    group.add_argument("-o", "--output", type=Path, metavar="FOLDER", help=text)


def _score_options(parser: Parser) -> None:
    add_bundle(parser)
    _add_count(parser, 1000)


def _judge_options(parser: Parser) -> None:
    text = "where to write the judge: images in, logits and features out"
    parser.add_argument("output", type=Path, metavar="FILE.onnx", help=text)
    _add_weights(parser)


def _show(options: argparse.Namespace) -> int:
    from dit_export.demo import run

    folder, progress = options.output or run.FOLDER, Progress(quiet=options.quiet)
    shown = run.demo(options.weights, folder, _count(options), progress)
    scores = {sheet.name: sheet.score for sheet in shown}
    passed = all(sheet.built.passed for sheet in shown)
    lines = []
    for sheet in shown:
        lines += [f"{sheet.name}:", *verdict(options, sheet.built)]
    lines.append(run.table(scores))
    lines += [f"{sheet.name}: grid {sheet.grid}, report {sheet.built.folder}/report.html" for sheet in shown]
    lines.append(f'sample: {dit_run()} sample {shown[-1].built.folder} --labels "red circle" "blue star"')
    bundles = [str(sheet.built.folder) for sheet in shown]
    table = {**run.to_dict(scores), "passed": passed, "bundles": bundles}
    answer(options, table, "\n".join(lines), brief="\n".join(bundles))
    return int(not passed)


def _show_sr(options: argparse.Namespace) -> int:
    from dit_export.demo import run, run_sr

    folder, progress = options.output or run.FOLDER, Progress(quiet=options.quiet)
    shown = run_sr.show(options.weights, folder, _count(options), progress)
    lines = []
    for name, built in shown.built.items():
        lines += [f"{name}:", *verdict(options, built)]
    result = [run_sr.table(shown.rows), table(shown.verdict)]
    lines += [*result, f"low, bicubic, drawn and true: {shown.grid}"]
    brief = "" if shown.passed else "\n".join(result)
    answer(options, run_sr.to_dict(shown), "\n".join(lines), brief)
    return int(not shown.passed)


def _score(options: argparse.Namespace) -> int:
    from dit_export.demo import run

    scores = run.compare(options.weights, options.bundle, _count(options), Progress(quiet=options.quiet))
    answer(options, run.to_dict(scores), run.table(scores))
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
    answer(options, {"folder": str(options.output)}, str(options.output))
    return 0


def _train_sr(options: argparse.Namespace) -> int:
    from dit_export.demo import store
    from dit_export.demo.run import present
    from dit_export.demo.train_sr import train

    folder = present(options.folder)
    train(folder / store.SR, folder, seed=options.seed, resume=options.resume)
    answer(options, {"folder": str(folder / store.SR)}, str(folder / store.SR))
    return 0


def _judge(options: argparse.Namespace) -> int:
    from dit_export.demo.run import export_judge

    export_judge(options.weights, options.output)
    answer(options, {"output": str(options.output)}, str(options.output))
    return 0


COMMAND = Command(
    "demo",
    "train, build and score a small DiT that draws shapes",
    lambda parser: None,
    lambda options: 0,
    parts={
        "look": (
            Command(
                "show",
                "build and verify it in fp32 and int8, draw grids, score them",
                _show_options,
                _show,
                ("demo show", "demo show --count 2000 -o bundles"),
            ),
            Command(
                "show-sr",
                "enlarge pictures from 16 to 64 pixels; score them and bicubic",
                _show_options,
                _show_sr,
                ("demo show-sr",),
            ),
            Command(
                "score",
                "score a bundle and PyTorch with the judge",
                _score_options,
                _score,
                ("demo score engines/build/demo-int8 --count 2000",),
            ),
        ),
        "train": (
            Command(
                "train",
                "train autoencoder, judge and DiT from nothing, in about two hours",
                _train_options,
                _train,
                ("demo train my-demo  # goes on where it was stopped",),
            ),
            Command(
                "train-sr",
                "train super-resolution from its DiT, in about half an hour",
                _train_sr_options,
                _train_sr,
                ("demo train-sr my-demo",),
            ),
            Command(
                "judge",
                "write the judge as ONNX, to score without PyTorch",
                _judge_options,
                _judge,
                ("demo judge judge.onnx",),
            ),
        ),
    },
)
