"""`dit-run`: sample, info, verify, compile and bench a bundle, with NumPy and one engine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime import backends, bench, images, verify
from dit_runtime.backends import Options, Tuning
from dit_runtime.bundle import manifest
from dit_runtime.bundle.compiling import compile_stages, provider, remove, why_unavailable
from dit_runtime.bundle.summary import summary
from dit_runtime.console import Parser, guarded, printable
from dit_runtime.errors import UsageError
from dit_runtime.npy import read_array, read_condition
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.request import Request
from dit_runtime.sampling.caches import CACHES, SETTINGS
from dit_runtime.sampling.guidance import POLICIES
from dit_runtime.sampling.process import FLOW_SPACINGS, SOLVERS, SPACINGS


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded("dit-run", _main, arguments)


def _main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _parser() -> Parser:
    parser = Parser(prog="dit-run", description="Sample from a bundle with NumPy and one engine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    sample = commands.add_parser("sample", help="pictures from prompts, class names or numbers, or from arrays")
    add_bundle(sample)
    sample.add_argument("--labels", nargs="+", default=[], metavar="CLASS", help="names or numbers, one a picture")
    sample.add_argument(
        "--condition",
        nargs="+",
        default=[],
        metavar="NAME=FILE.npy",
        help="arrays by port, rows first, a picture a row; or one FILE.npz of them",
    )
    sample.add_argument("--negative-condition", nargs="+", default=[], metavar="NAME=FILE.npy", help="for guidance")
    sample.add_argument("--prompt", nargs="+", metavar="TEXT", help="one a picture")
    sample.add_argument("--negative", nargs="+", metavar="TEXT", help="one for all, or one a picture; default: none")
    add_size(sample)
    sample.add_argument("--preset", help="values for the options below, as `dit-run info` lists them; yours win")
    sample.add_argument("--steps", type=int, help="default: the bundle's")
    sample.add_argument(
        "--guidance", "--cfg-scale", type=float, nargs="+", help="one, or one a picture; default: the bundle's"
    )
    sample.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide the steps between these fractions of the time; others evaluate half the rows. Default: 0 1",
    )
    sample.add_argument(
        "--guidance-policy",
        nargs="+",
        metavar=("NAME", "KEY=VALUE"),
        help=f"{', '.join(POLICIES)}, with numbers that are not the defaults",
    )
    sample.add_argument("--seed", type=int, nargs="+", default=[0], help="one for all, or one a picture")
    sample.add_argument("--solver", help=f"{', '.join(SOLVERS)}; default: the bundle's")
    sample.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0 to 1")
    spacings = ", ".join(dict.fromkeys(SPACINGS + FLOW_SPACINGS))
    sample.add_argument("--spacing", help=f"of the timesteps: {spacings}; or the times themselves: 999,640,300")
    text = f"of outputs: {', '.join(CACHES)}, which decides for all pictures of a request at once; default: none"
    sample.add_argument("--cache", help=text)
    sample.add_argument("--cache-interval", type=int, metavar="N", help="taylorseer evaluates each step of N")
    sample.add_argument("--max-order", type=int, metavar="N", help="of taylorseer, 0 to 2")
    sample.add_argument("--disable-cache-before-step", type=int, metavar="STEP")
    sample.add_argument("--disable-cache-after-step", type=int, metavar="STEP", help="below 0: from the end")
    sample.add_argument("--cache-threshold", type=float, metavar="X", help="the error that easycache lets grow")
    sample.add_argument("--latents", type=Path, metavar="FILE.npy", help="start from these instead of the seed's")
    sample.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("sample.png"),
        help=".png (a grid), .npz, .npy (latents), .mp4 of videos, or a folder for a .png of each image or frame",
    )
    sample.add_argument("--fps", type=int, default=25, help="frames a second of .mp4")
    sample.set_defaults(command=_sample)

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

    timing = commands.add_parser("bench", help="time each stage and a whole picture")
    add_bundle(timing)
    add_size(timing)
    timing.add_argument("--batch", type=int, default=1)
    timing.add_argument("--preset", help="of the bundle; default: none")
    timing.add_argument("--steps", type=int, help="default: the bundle's")
    timing.add_argument("--rounds", type=int, default=7)
    timing.set_defaults(command=_bench)
    return parser


def add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder with a manifest.json")
    parser.add_argument("--threads", type=int, help="of the engine; default: its own choice")
    parser.add_argument("--provider", help="ONNX Runtime's execution provider: cpu, cuda, cuda:N")
    parser.add_argument("--low-memory", action="store_true", help="open one stage at a time, while it is needed")
    parser.add_argument("--json", action="store_true", help="for machines, on standard output")


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", help="one of the bundle's, 512 or 512x768 for height x width; default: its first")


def add_tuning(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TensorRT", "how it builds, in its own words")
    group.add_argument("--compute-capability", nargs="+", metavar="8.9", help="GPUs to compile for; default: all known")
    group.add_argument("--builder-optimization-level", type=int, metavar="0-5")
    group.add_argument("--pool-limit", nargs="+", metavar="workspace:4G")
    group.add_argument("--version-compatible", action="store_true", default=None, help="opens in later versions too")
    group.add_argument("--hardware-compatibility-level", metavar="ampere+", help="none, ampere+, sameComputeCapability")
    group.add_argument("--weight-streaming", action="store_true", default=None, help="weights larger than GPU memory")
    group.add_argument("--strip-plan", action="store_true", default=None, help="weights stay in the ONNX form")
    group.add_argument("--refittable", action="store_true", default=None)
    group.add_argument("--timing-cache", metavar="FILE", help="read, and written when done")


def tuning(options: argparse.Namespace) -> Tuning:
    chosen = {field.name: getattr(options, field.name) for field in fields(Tuning)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()
    }
    return replace(Tuning(), **{name: value for name, value in values.items() if value is not None})


def _load_bundle(options: argparse.Namespace, size: str | None = None) -> Pipeline:
    names = ("threads", "provider", "low_memory")
    pipe = Pipeline.load(options.bundle, size=size, **{name: getattr(options, name) for name in names})
    lines = [backends.note(stage.backend, stage.precision) for stage in pipe.manifest.stages]
    for line in dict.fromkeys(lines):
        if line:
            print(f"note: {line}", file=sys.stderr)
    return pipe


def _sample(options: argparse.Namespace) -> int:
    writers: dict[str, Callable[[Path, np.ndarray], None]] = {
        ".png": _write_png,
        ".npz": images.write_npz,
        ".npy": np.save,
        ".mp4": lambda path, videos: images.write_mp4(path, videos, options.fps),
        "": images.write_folder,
    }
    if options.output.suffix not in writers:
        known = ", ".join(filter(None, writers))
        raise UsageError(f"output {options.output}: expected a name that ends in {known}, or a folder for PNGs")
    if not options.output.parent.is_dir():
        raise UsageError(f"output {options.output}: the folder {options.output.parent} does not exist")
    if options.output.suffix == ".mp4":
        images.require_mp4(options.output, options.fps)
    latents = read_array(options.latents) if options.latents else None
    condition = read_condition(options.condition, "--condition")
    negative = read_condition(options.negative_condition, "--negative-condition")
    progress = Progress()
    with _load_bundle(options, options.size) as pipe:
        if options.output.suffix == ".mp4" and len(pipe.manifest.require_end().gives[0].shape) == 4:
            raise UsageError(f"output {options.output}: this bundle draws images, no videos; take .png")
        request = Request(
            options.labels,
            condition=condition,
            negative=negative,
            prompt=options.prompt,
            negative_prompt=options.negative,
            steps=options.steps,
            guidance=options.guidance[0] if options.guidance and len(options.guidance) == 1 else options.guidance,
            guidance_interval=options.guidance_interval,
            guidance_policy=options.guidance_policy and " ".join(options.guidance_policy),
            seed=options.seed if len(options.seed) > 1 else options.seed[0],
            solver=options.solver,
            eta=options.eta,
            spacing=options.spacing,
            preset=options.preset,
            cache=options.cache,
            **{key: getattr(options, key) for key in SETTINGS},
            latents=latents,
            output="latents" if options.output.suffix == ".npy" else "images",
        )
        run = pipe.run(request)
        while run.step():
            progress.step(run.done, run.steps, "sample")
        result = run.result()
    progress.end()
    writers[options.output.suffix](options.output, result)
    if options.json:
        print(json.dumps({"output": str(options.output), "shape": list(result.shape), "rows": run.rows}))
    else:
        print(options.output)
    return 0


def _write_png(path: Path, pictures: np.ndarray) -> None:
    images.write_png(path, images.grid(pictures))


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
        hint = f"not installed: pip install 'dit-export[{name}]'"
        reason = backends.backend(name).why_unavailable() if version else None
        state = f"{version}, and cannot run here: {reason}" if reason else version
        print(f"backend {name}: {state or hint}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    return report(_figures(options), options.json)


def _figures(options: argparse.Namespace) -> list[verify.Figure]:
    progress = Progress()
    with _load_bundle(options) as pipe:
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
    with _load_bundle(options, options.size) as pipe:
        rows = bench.measure(pipe, options.batch, options.steps, options.rounds, Progress(), options.preset)
    print(json.dumps([row._asdict() for row in rows], indent=1) if options.json else printable(bench.table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
