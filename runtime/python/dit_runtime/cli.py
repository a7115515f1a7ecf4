"""`dit-run`: sample, info, verify, compile and bench a bundle, with NumPy and one engine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dit_runtime import backends, bench, images, verify
from dit_runtime.backends import Options, Tuning
from dit_runtime.bundle import manifest
from dit_runtime.bundle.compiling import compile_graphs, obstacle, remove
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.captions import Captions
from dit_runtime.errors import GateError, UsageError
from dit_runtime.pipeline import EngineError, Pipeline, Stopped
from dit_runtime.progress import Progress
from dit_runtime.sampling.schedule import SOLVERS, SPACINGS


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded("dit-run", lambda: _main(arguments))


def guarded(program: str, command: Callable[[], int]) -> int:
    """Runs a command; the user's own mistakes are one line and exit code 2, a failed gate 1, ctrl-c 130."""
    try:
        return command()
    except (UsageError, OSError) as error:
        message = " ".join(str(error).split())
        code = 2
    except (EngineError, GateError, Stopped) as error:
        message, code = str(error), 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"{program}: error: {message}", file=sys.stderr)
    return code


def _main(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


class Parser(argparse.ArgumentParser):
    """Its errors are one line too."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _parser() -> Parser:
    parser = Parser(prog="dit-run", description="Sample from a bundle with NumPy and one engine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    sample = commands.add_parser("sample", help="pictures from class names or numbers")
    add_bundle(sample)
    sample.add_argument("--labels", nargs="+", default=[], metavar="CLASS", help="names or numbers, one a picture")
    sample.add_argument("--captions", type=Path, metavar="FILE.npy", help="text embeddings (N, L, C) instead of labels")
    sample.add_argument(
        "--mask", type=Path, metavar="FILE.npy", help="which tokens captions have, (N, L); default: all"
    )
    sample.add_argument("--negative", type=Path, metavar="FILE.npy", help="of an empty text, for guidance")
    sample.add_argument("--negative-mask", type=Path, metavar="FILE.npy")
    sample.add_argument("--steps", type=int, default=25)
    sample.add_argument("--guidance", "--cfg-scale", type=float, nargs="+", default=[4.0], help="one, or one a picture")
    sample.add_argument("--seed", type=int, nargs="+", default=[0], help="one for all, or one a picture")
    sample.add_argument("--solver", help=f"{', '.join(SOLVERS)}; default: the bundle's")
    sample.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0 to 1")
    sample.add_argument("--spacing", help=f"of the timesteps: {', '.join(SPACINGS)}; default: the bundle's")
    sample.add_argument("--latents", type=Path, metavar="FILE.npy", help="start from these instead of the seed's")
    sample.add_argument(
        "-o", "--output", type=Path, default=Path("sample.png"), help=".png (a grid), .npz or .npy (latents)"
    )
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

    timing = commands.add_parser("bench", help="time each graph and a whole picture")
    add_bundle(timing)
    timing.add_argument("--batch", type=int, default=1)
    timing.add_argument("--steps", type=int, default=25)
    timing.add_argument("--rounds", type=int, default=7)
    timing.set_defaults(command=_bench)
    return parser


def add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder with a manifest.json")
    parser.add_argument("--threads", type=int, help="of the engine; default: its own choice")
    parser.add_argument("--provider", help="ONNX Runtime's execution provider: cpu, cuda")
    parser.add_argument("--low-memory", action="store_true", help="open one graph at a time, while it is needed")
    parser.add_argument("--json", action="store_true", help="for machines, on standard output")


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
    given = {field.name: getattr(options, field.name) for field in fields(Tuning)}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return replace(Tuning(), **{name: value for name, value in values.items() if value is not None})


def _load(options: argparse.Namespace) -> Pipeline:
    return Pipeline.load(
        options.bundle, threads=options.threads, provider=options.provider, low_memory=options.low_memory
    )


def _sample(options: argparse.Namespace) -> int:
    writers: dict[str, Callable[[Path, np.ndarray], None]] = {
        ".png": _write_png,
        ".npz": images.write_npz,
        ".npy": np.save,
    }
    if options.output.suffix not in writers:
        raise UsageError(f"output {options.output}: expected a name that ends in {', '.join(writers)}")
    if not options.output.parent.is_dir():
        raise UsageError(f"output {options.output}: the folder {options.output.parent} does not exist")
    latents = _read_array(options.latents) if options.latents else None
    captions = _read_captions(options.captions, options.mask, "--captions")
    negative = _read_captions(options.negative, options.negative_mask, "--negative")
    progress = Progress()
    with _load(options) as pipe:
        result = pipe.sample(
            options.labels,
            captions=captions,
            negative=negative,
            steps=options.steps,
            guidance=options.guidance if len(options.guidance) > 1 else options.guidance[0],
            seed=options.seed if len(options.seed) > 1 else options.seed[0],
            solver=options.solver,
            eta=options.eta,
            spacing=options.spacing,
            latents=latents,
            output="latents" if options.output.suffix == ".npy" else "images",
            on_step=(lambda step, steps, _: progress.step(step, steps, "sample")) if progress.shown else None,
        )
    progress.end()
    writers[options.output.suffix](options.output, result)
    if options.json:
        print(json.dumps({"output": str(options.output), "shape": list(result.shape)}))
    else:
        print(options.output)
    return 0


def _write_png(path: Path, pictures: np.ndarray) -> None:
    images.write_png(path, images.grid(pictures))


def _read_captions(embeddings: Path | None, mask: Path | None, what: str) -> Captions | np.ndarray | None:
    if embeddings is None:
        if mask is not None:
            raise UsageError(f"{mask}: a mask without {what}")
        return None
    return _read_array(embeddings) if mask is None else Captions(_read_array(embeddings), _read_array(mask))


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # what a damaged file raises shares no base class but this
        raise UsageError(f"{path}: not a .npy file of numbers: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise UsageError(f"{path}: not a .npy file of numbers")
    return array


def _info(options: argparse.Namespace) -> int:
    table: dict[str, Any] = {"backends": backends.versions()}
    contract = manifest.read(options.bundle) if options.bundle else None
    if contract:
        table["bundle"] = json.loads(contract.to_json())
    if options.json:
        print(json.dumps(table, indent=1, ensure_ascii=False))
        return 0
    if contract:
        print(summary(options.bundle, contract))
    for name, version in table["backends"].items():
        hint = f"not installed: pip install 'dit-export[{name}]'"
        reason = backends.backend(name).obstacle() if version else None
        found = f"{version}, and cannot run here: {reason}" if reason else version
        print(f"backend {name}: {found or hint}")
    return 0


def summary(folder: Path, contract: Manifest) -> str:
    """A bundle in a few lines."""
    model, sampler = contract.model, contract.diffusion.sampler
    sizes = {name: sum(contract.files[file].size for file in graph.files) for name, graph in contract.graphs.items()}
    lines = [
        f"{folder}",
        f"model      {model.get('name')} at {model.get('resolution')} px, {_given(contract)}",
        f"sampling   {sampler.solver} on {contract.diffusion.prediction}, "
        f"guidance on {contract.guided_channels} of {contract.latent_shape[0]} channels",
    ]
    for name, graph in contract.graphs.items():
        lines.append(f"{name:<10} {graph.precision} on {graph.backend}, {sizes[name] / 1e6:.1f} MB")
    parity = contract.parity
    outcome = ("passed" if parity["passed"] else "FAILED") if "passed" in parity else "not verified"
    lines.append(f"parity     {outcome}, proof: {parity.get('proof', 'none')}")
    origin = [f"{key} {contract.source[key]}" for key in ("kind", "path", "hub", "seed") if key in contract.source]
    lines.append(f"weights    {', '.join(origin)}")
    return "\n".join(lines)


def _given(contract: Manifest) -> str:
    """What it draws by."""
    if contract.caption_shape is not None:
        return "captions of up to {} tokens x {}".format(*contract.caption_shape)
    return f"{contract.num_classes} classes{'' if contract.labels else ' without names'}"


def _verify(options: argparse.Namespace) -> int:
    return report(_checks(options), options.json)


def _checks(options: argparse.Namespace) -> list[verify.Check]:
    progress = Progress()
    with _load(options) as pipe:
        checks = verify.verify(pipe, lambda done, total: progress.step(done, total, "verify"))
    progress.end()
    return checks


def report(checks: list[verify.Check], as_json: bool) -> int:
    """Prints the table or JSON; the exit code is 1 when a gate failed."""
    passed = all(check.passed for check in checks)
    if as_json:
        print(json.dumps({"passed": passed, "checks": [check.to_dict() for check in checks]}, indent=1))
    else:
        print(verify.table(checks))
        print("verified" if passed else "FAILED: these engines do not draw PyTorch's pictures")
    return 0 if passed else 1


def _compile(options: argparse.Namespace) -> int:
    folder = options.bundle
    contract = manifest.read(folder, engines=False)
    settings = Options(options.threads, options.provider, tuning=tuning(options))
    compiled = compile_graphs(folder, contract, options.backend, settings, Progress())
    code = 1
    try:
        manifest.write(folder, compiled)
        if reason := obstacle(compiled):
            code = 0
            if options.json:
                print(json.dumps({"passed": None, "reason": reason}))
            else:
                print(f"compiled and not verified: {reason}; on the target: dit-run verify {folder}")
        else:
            checks = _checks(options)
            code = report(checks, options.json)
            parity = verify.summary(contract.parity.get("proof", "none"), checks)
            compiled = replace(compiled, parity=parity)
    finally:  # engines that fail do not stay, and only those that do not are put in the place of others
        stays, goes = (contract, compiled) if code else (compiled, contract)
        try:
            manifest.write(folder, stays)
        finally:  # on a full disk too
            remove(folder, goes.files.keys() - stays.files.keys())
    return code


def _bench(options: argparse.Namespace) -> int:
    with _load(options) as pipe:
        rows = bench.measure(pipe, options.batch, options.steps, options.rounds, Progress())
    print(json.dumps([row._asdict() for row in rows], indent=1) if options.json else bench.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
