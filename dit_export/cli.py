"""`dit-export`: from a checkpoint to a verified bundle; every command's work is in the room of its name."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dit_export.bench import command as bench_command
from dit_export.spec import CONDITIONINGS, MODELS, PRECISIONS, Recipe
from dit_export.verify import command as regress_command
from dit_runtime import backends
from dit_runtime.bundle import manifest
from dit_runtime.bundle.compiling import obstacle, targets
from dit_runtime.cli import Parser, add_bundle, add_tuning, guarded, report
from dit_runtime.errors import UsageError
from dit_runtime.progress import Progress
from dit_runtime.sampling.schedule import PREDICTIONS

if TYPE_CHECKING:
    from dit_export.bundle.build import Built


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded("dit-export", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    result: int = options.command(options)
    return result


def _parser() -> Parser:
    parser = Parser(prog="dit-export", description="Turn a PyTorch DiT into engines that ship.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="checkpoint -> verified bundle")
    _add_recipe(build)
    build.set_defaults(command=_build)

    quantize = commands.add_parser("quantize", help="an int8 bundle whose layers were tried one by one, and its recipe")
    _add_recipe(quantize)
    quantize.add_argument("--budget", metavar="METRIC=N", help="PSNR=35 or latent-rel-l2=0.05, at the end of runs")
    quantize.add_argument("--tune", action="store_true", help="leave in float what int8 makes no faster here")
    quantize.add_argument("--recipe", type=Path, metavar="FILE.toml", help="default: BUNDLE.toml beside the bundle")
    quantize.set_defaults(command=_quantize)

    inspect = commands.add_parser("inspect", help="what a bundle or an ONNX file holds")
    inspect.add_argument("path", type=Path)
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(command=_inspect)

    verify = commands.add_parser("verify", help="a bundle against PyTorch, with the weights it was built from")
    add_bundle(verify)
    verify.set_defaults(command=_verify)

    regress = commands.add_parser("regress", help="a bundle's figures within the limits of a baseline, for CI")
    regress.set_defaults(command=regress_command.add_options(regress))

    hoist = commands.add_parser("hoist", help="split any ONNX graph at what does not depend on a loop's input")
    hoist.add_argument("path", type=Path, metavar="MODEL.onnx")
    hoist.add_argument("--loop-input", nargs="+", required=True, metavar="NAME", help="what changes every step")
    hoist.add_argument(
        "--step-input", nargs="+", default=[], metavar="NAME", help="what changes every step and is known before, as t"
    )
    hoist.add_argument("-o", "--output", type=Path, metavar="DIR", help="default: MODEL-hoisted beside the model")
    hoist.add_argument("--json", action="store_true")
    hoist.set_defaults(command=_hoist)

    bench = commands.add_parser("bench", help="a step and a picture, by us and by what people would use instead")
    bench.set_defaults(command=bench_command.add_options(bench))

    demo = commands.add_parser("demo", help="a small DiT on shapes that it draws itself: train, build, score")
    parts = demo.add_subparsers(required=True, metavar="PART")
    train = parts.add_parser("train", help="autoencoder, judge and DiT from nothing, about two hours; resumes")
    train.add_argument("output", type=Path, metavar="DIR", help="folder for the weights, as diffusers lays it out")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--no-resume", dest="resume", action="store_false", help="forget what an earlier run reached")
    train.set_defaults(command=_demo_train)
    show = parts.add_parser("show", help="build and verify it in fp32 and int8, draw grids, let the judge score them")
    show.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="of the bundles demo-fp32 and demo-int8; default: engines/build",
    )
    show.set_defaults(command=_demo_show)
    score = parts.add_parser("score", help="a bundle of it and PyTorch before the judge")
    score.add_argument("bundle", type=Path)
    score.set_defaults(command=_demo_score)
    for part, count in ((show, 400), (score, 1000)):
        part.add_argument("--count", type=int, default=count, help=f"pictures that the judge sees; default {count}")
        part.add_argument("--json", action="store_true")
    judge = parts.add_parser("judge", help="the judge as ONNX, to score without PyTorch")
    judge.add_argument("output", type=Path, metavar="FILE.onnx")
    judge.set_defaults(command=_demo_judge)
    for part in (show, score, judge):
        part.add_argument("--weights", type=Path, metavar="DIR", help="what `demo train` wrote; default: what ships")
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help=f"{', '.join(MODELS)}, or a recipe.toml; a checkpoint knows its own")
    parser.add_argument("--conditioning", help=f"{', '.join(CONDITIONINGS)}; a checkpoint knows its own")
    parser.add_argument(
        "--resolution",
        type=lambda text: int(text) if text.isdecimal() else text,
        help="of the pictures, or HEIGHTxWIDTH; 256 unless the checkpoint says otherwise",
    )
    parser.add_argument("--precision", help=", ".join(PRECISIONS))
    parser.add_argument("--backend", help=f"auto, {', '.join(backends.BACKENDS)}")
    parser.add_argument("--checkpoint", metavar="PATH|HUB-ID", help="diffusers folder, Meta's .pt, .safetensors")
    parser.add_argument("--vae", metavar="PATH|HUB-ID", help="the VAE of a checkpoint that holds none")
    parser.add_argument("--labels", metavar="FILE", help="class names: one a line, or JSON")
    parser.add_argument("--heads", type=int, help="attention heads, where the checkpoint's size is in no table")
    parser.add_argument(
        "--prediction", help=f"what the network gives, where no scheduler says it: {', '.join(PREDICTIONS)}"
    )
    parser.add_argument("--calibration", metavar="FILE", help="of an earlier int8 build; default: calibrate anew")
    parser.add_argument(
        "--captions",
        metavar="FILE",
        help="text embeddings to calibrate int8 with, .npy or .npz; of more than 20, 20 spread evenly",
    )
    parser.add_argument("--keep-float", nargs="+", metavar="LAYER", help='int8: "block 3 fc2", "block 0", fc2')
    parser.add_argument("--synthetic", type=int, nargs="?", const=0, metavar="SEED", help="made-up weights")
    parser.add_argument("--latents-only", action="store_true", default=None, help="build no decoder")
    parser.add_argument("--max-batch", type=int, help="pictures the denoiser takes at a time; default 8")
    parser.add_argument("-o", "--output", metavar="DIR", help="default: a folder in engines/build")
    parser.add_argument("--json", action="store_true", help="the checks, for machines, on standard output")
    add_tuning(parser)


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe file's fields, then the flags that were given."""
    recipe, given = Recipe(), {field.name: getattr(options, field.name) for field in fields(Recipe)}
    if options.model and options.model.endswith(".toml"):
        recipe, given["model"] = Recipe.from_toml(Path(options.model)), None
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def _build(options: argparse.Namespace) -> int:
    from dit_export.bundle.build import build

    return _built(build(_recipe(options), Progress()), options)


def _quantize(options: argparse.Namespace) -> int:
    from dit_export.bundle.build import build
    from dit_export.precision.search import Budget, Wish

    recipe = _recipe(options)
    if options.precision == "fp32" or recipe.precision not in ("fp32", "int8"):
        raise UsageError(f"precision {recipe.precision!r}; expected int8, or nothing")
    budget = Budget.parse(options.budget) if options.budget else None
    if options.recipe and not options.recipe.parent.is_dir():
        raise UsageError(f"{options.recipe}: the folder {options.recipe.parent} does not exist")
    built = build(replace(recipe, precision="int8"), Progress(), Wish(budget, options.tune))
    path = options.recipe or built.folder.with_name(f"{built.folder.name}.toml")
    found = Recipe(**manifest.read(built.folder).source["recipe"])
    path.write_text(found.to_toml(), encoding="utf-8")
    code = _built(built, options)
    print(
        f"in float: {', '.join(found.keep_float or []) or 'no layer'}\nrecipe: {path}",
        file=sys.stderr if options.json else sys.stdout,
    )
    return code


def _built(built: Built, options: argparse.Namespace) -> int:
    code = _report(built, options.json)
    out = sys.stderr if options.json else sys.stdout
    if code:
        print(f"the bundle that failed: {built.folder}", file=out)
    else:
        contract = manifest.read(built.folder)
        labels = f"--labels {contract.num_classes // 4} {3 * contract.num_classes // 4}"
        to_file = "" if "decoder" in contract.graphs else " -o latents.npy"
        print(f"bundle: {built.folder}\nsample: {_dit_run()} sample {built.folder} {labels}{to_file}", file=out)
        if reason := obstacle(contract):
            print(
                f"verified through its rounding twins, for it does not run here: {reason}\n"
                f"it runs on {targets(contract)}; there, prove it: {_dit_run()} verify {built.folder}",
                file=out,
            )
    return code


def _dit_run() -> str:
    """As the user can type it: `make` runs us from an environment that is not activated."""
    beside = Path(sys.executable).with_name("dit-run")
    return "dit-run" if shutil.which("dit-run") else os.path.relpath(beside)


def _report(built: Built, as_json: bool) -> int:
    code = report(built.checks, as_json)
    if not built.sensitive:
        figures = "; ".join(f"{check.name}: {check.value:.2g}, expected {check.limit:.2g}" for check in built.proof)
        print(
            "warning: these weights hardly react to label, guidance or timestep, so parity on them proves little "
            f"(insensitive in {built.folder}/parity.json; {figures})",
            file=sys.stderr,
        )
    return code


def _verify(options: argparse.Namespace) -> int:
    from dit_export.bundle.build import check
    from dit_export.checkpoints import load_source
    from dit_export.graph.trace import Decoder

    contract, progress = manifest.read(options.bundle), Progress()
    with progress.stage("weights"):
        loaded = load_source(contract, options.bundle)
    decoder = None if loaded.vae is None else Decoder(loaded.vae).eval()
    how = {name: getattr(options, name) for name in ("threads", "provider", "low_memory")}
    built = check(options.bundle, loaded, decoder, progress, **how)
    return _report(built, options.json)


def _inspect(options: argparse.Namespace) -> int:
    from dit_export.graph.inspection import describe, table

    tables = describe(options.path)
    print(json.dumps(tables, indent=1) if options.json else table(tables))
    return 0


def _hoist(options: argparse.Namespace) -> int:
    from dit_export.graph import onnxfile
    from dit_export.passes.hoist import hoist

    if not options.path.is_file():
        raise UsageError(f"{options.path}: no such file; expected an ONNX model")
    folder = options.output or options.path.with_name(options.path.stem + "-hoisted")
    if folder.resolve() == options.path.parent.resolve():
        raise UsageError(
            f"output {folder}: the folder of the model itself, whose weights are read meanwhile; take another"
        )
    hoisted = hoist(onnxfile.load(options.path), options.loop_input, options.step_input)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, graph in (("invariant", hoisted.invariant), ("loop", hoisted.loop)):
        onnxfile.save(graph, folder / f"{name}.onnx")
        weights[name] = onnxfile.weight_bytes(graph)
    if options.json:
        print(json.dumps({"folder": str(folder), "weight_bytes": weights, **hoisted.to_dict()}))
        return 0
    print(f"{len(hoisted.frontier)} tensors cross from {folder / 'invariant.onnx'} to {folder / 'loop.onnx'}")
    for name, size in weights.items():
        print(f"{name}: {size / 1e6:.1f} MB of weights ({size / max(1, sum(weights.values())):.0%})")
    print(hoisted.table())
    return 0


def _demo_show(options: argparse.Namespace) -> int:
    from dit_export.demo import run

    shown = run.demo(options.weights, options.output or run.FOLDER, _count(options), Progress())
    scores = {one.name: one.score for one in shown}
    code = int(not all(one.built.passed for one in shown))
    if options.json:
        print(run.to_json(scores))
        return code
    for one in shown:
        print(f"{one.name}:")
        _report(one.built, as_json=False)
    print(run.table(scores))
    for one in shown:
        print(f"{one.name}: grid {one.grid}, report {one.built.folder}/report.html")
    print(f'sample: {_dit_run()} sample {shown[-1].built.folder} --labels "red circle" "blue star"')
    return code


def _demo_score(options: argparse.Namespace) -> int:
    from dit_export.demo import run

    scores = run.compare(options.weights, options.bundle, _count(options), Progress())
    print(run.to_json(scores) if options.json else run.table(scores))
    return 0


def _count(options: argparse.Namespace) -> int:
    if options.count < 100:
        raise UsageError(f"count {options.count}; expected at least 100, for a distance between distributions")
    return int(options.count)


def _demo_train(options: argparse.Namespace) -> int:
    from dit_export.demo import card
    from dit_export.demo.train import train

    train(options.output, seed=options.seed, resume=options.resume)
    card.write(options.output)
    return 0


def _demo_judge(options: argparse.Namespace) -> int:
    from dit_export.demo.run import export_judge

    export_judge(options.weights, options.output)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
