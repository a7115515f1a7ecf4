"""`dit-run sample`: pictures from prompts, classes or arrays, as files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime import cluster, images, shards
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.console import answer
from dit_runtime.errors import GateError, UsageError
from dit_runtime.facts import DEFAULT_STRENGTH
from dit_runtime.npy import read_array, read_condition
from dit_runtime.options import Known, Parser, add_bundle, add_engine, add_public_key, add_size, load_bundle
from dit_runtime.picture_files import read_mask, read_picture
from dit_runtime.progress import Counted, Progress
from dit_runtime.request import Request
from dit_runtime.sampling.caches import CACHES, SETTINGS
from dit_runtime.sampling.guidance import POLICIES
from dit_runtime.sampling.process import FLOW_SPACINGS, SOLVERS, SPACINGS

OUTPUT = Path("sample.png")


def add_options(parser: Parser) -> None:
    add_bundle(parser)
    _add_what(parser)
    _add_how(parser.add_argument_group("sampling", "Each of these wins over --preset."))
    _add_cache(
        parser.add_argument_group("output cache", "Predict from earlier steps instead of evaluating the network.")
    )
    _add_start(parser.add_argument_group("start", "Start from latents or pictures in the place of the seed's noise."))
    _add_shards(
        parser.add_argument_group("many pictures", "Shards to score. The same command resumes a run that stopped.")
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        default=OUTPUT,
        metavar="FILE",
        help=".png (a grid), .npz, .npy (latents), .mp4 of videos, or a folder for a .png of each image or frame; "
        f"default: {OUTPUT}",
    )
    group.add_argument("--fps", type=int, default=25, metavar="N", help="frames a second of an .mp4; default: 25")
    add_engine(parser)
    add_public_key(parser.add_argument_group("safety").add_argument)


def _add_what(parser: Parser) -> None:
    add = parser.add_argument_group("what to draw").add_argument
    add("--prompt", nargs="+", metavar="TEXT", help="a prompt for each picture")
    add("--negative", nargs="+", metavar="TEXT", help="prompts to lead away from: one for all, or one for each")
    add("--labels", nargs="+", default=[], metavar="CLASS", help="a class for each picture, by name or number")
    add(
        "--condition",
        nargs="+",
        default=[],
        metavar="NAME=FILE.npy",
        help="an array for each port, with a row for each picture; or FILE.npz, which has all of them",
    )
    text = "what to lead away from, in the form of --condition: a row for all pictures, or one for each"
    add("--negative-condition", nargs="+", default=[], metavar="NAME=FILE.npy", help=text)
    add(
        "--seed",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="a seed for all pictures, or one for each; default: 0",
    )


def _add_how(group: Any) -> None:
    add = group.add_argument
    add_size(group)
    add("--preset", metavar="NAME", help="a plan of the bundle: `dit-run info` lists them")
    add("--steps", type=int, metavar="N", help="steps of a run; default: the bundle's")
    add("--solver", type=Known(SOLVERS), metavar="NAME", help=f"{', '.join(SOLVERS)}; default: the bundle's")
    add("--eta", type=float, default=0.0, metavar="X", help="noise of ddim, 0 to 1; default: 0")
    names = tuple(dict.fromkeys(SPACINGS + FLOW_SPACINGS))
    text = f"spacing of the timesteps: {', '.join(names)}; or the times themselves: 999,640,300; default: the bundle's"
    add("--spacing", type=Known(names), metavar="NAME", help=text)
    text = "weight of guidance: one for all pictures, or one for each; default: the bundle's"
    add("--guidance", "--cfg-scale", type=float, nargs="+", metavar="X", help=text)
    text = "guide the steps between these fractions of the time; others evaluate half the rows; default: 0 1"
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
    text = f"{', '.join(POLICIES)}; KEY=VALUE replaces a default; default: the network's own rule"
    add("--guidance-policy", nargs="+", metavar=("NAME", "KEY=VALUE"), type=Known(POLICIES), help=text)


def _add_cache(group: Any) -> None:
    add = group.add_argument
    text = f"{', '.join(CACHES)} (which decides for all pictures at once); default: none"
    add("--cache", type=Known(CACHES), metavar="NAME", help=text)
    add("--cache-interval", type=int, metavar="N", help="taylorseer evaluates every Nth step")
    add("--max-order", type=int, metavar="N", help="order of taylorseer's series, 0 to 2")
    add("--disable-cache-before-step", type=int, metavar="N", help="evaluate all steps before this one")
    text = "evaluate this step and all after it; below 0: counted from the end"
    add("--disable-cache-after-step", type=int, metavar="N", help=text)
    add("--cache-threshold", type=float, metavar="X", help="error up to which easycache reuses a prediction")


def _add_start(group: Any) -> None:
    add = group.add_argument
    add("--latents", type=Path, metavar="FILE.npy", help="the state to start from")
    text = "PNG, JPEG or WebP files to start from: one for all pictures, or one for each; stretched to the bundle's "
    add("--image", type=Path, nargs="+", metavar="FILE", help=text + "size; super-resolution enlarges them")
    text = f"share of the steps that change --image; default: {DEFAULT_STRENGTH:g}"
    add("--strength", type=float, metavar="X", help=text)
    text = "redraw --image where this picture is white, or where it is transparent if it has transparent pixels"
    add("--mask", type=Path, nargs="+", metavar="FILE", help=text)


def _add_shards(group: Any) -> None:
    add = group.add_argument
    text = "pictures in all; picture i has the seed --seed + i, and labels or prompts take turns"
    add("--count", type=int, metavar="N", help=text)
    add("--shards", type=Path, metavar="FOLDER", help="an .npz for each shard: arr_0, arr_1 (classes), seeds")
    add("--shard-size", type=int, metavar="N", help=f"pictures in a shard; default: {shards.SIZE}")
    add("--batch", type=int, metavar="N", help=f"pictures in a call; default: {shards.BATCH}")
    text = "draw on a Ray cluster; without ADDRESS the one of RAY_ADDRESS, or a new one of this machine"
    add("--ray", nargs="?", const="", metavar="ADDRESS", help=text)
    add("--workers", type=int, metavar="N", help="workers of the cluster; default: one a machine, or one a GPU")


def run(options: argparse.Namespace) -> int:
    many = ("count", "shards", "shard_size", "batch", "ray", "workers")
    return _sample(options) if all(getattr(options, name) is None for name in many) else _sample_shards(options)


def _sample(options: argparse.Namespace) -> int:
    writers: dict[str, Callable[[Path, np.ndarray], None]] = {
        ".png": _write_png,
        ".npz": images.write_npz,
        ".npy": images.write_npy,
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
    progress = Progress(quiet=options.quiet)
    with load_bundle(options, options.size) as pipe:
        if options.output.suffix == ".mp4" and len(pipe.manifest.require_end().gives[0].shape) == 4:
            raise UsageError(f"output {options.output}: this bundle draws images, no videos; take .png")
        smooth = "bicubic" if pipe.manifest.picture else "lanczos"  # as a low-resolution picture is in training
        request = Request(
            options.labels,
            condition=condition,
            negative=negative,
            prompt=options.prompt,
            seed=options.seed if len(options.seed) > 1 else options.seed[0],
            latents=latents,
            image=_read(partial(read_picture, smooth=smooth), options.image, pipe.manifest),
            mask=_read(read_mask, options.mask, pipe.manifest),
            strength=options.strength,
            output="latents" if options.output.suffix == ".npy" else "images",
            **_fields(options),
        )
        trajectory = pipe.run(request)
        while trajectory.step():
            progress.step(trajectory.done, trajectory.steps, "sample")
        result = trajectory.result()
    progress.end()
    writers[options.output.suffix](options.output, result)
    table = {"output": str(options.output), "shape": list(result.shape), "rows": trajectory.rows}
    answer(options, table, str(options.output))
    return 0


def _read(
    read: Callable[[Path, int, int], NDArray[np.uint8]], files: Sequence[Path] | None, contract: Manifest
) -> NDArray[np.uint8] | None:
    """Return the pictures of files in the size that the bundle's encoder takes."""
    if not files:
        return None
    height, width = contract.picture_size
    return np.stack([read(file, height, width) for file in files])


def _fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a request that say how it is drawn."""
    guidance, policy = options.guidance, options.guidance_policy
    return {
        "negative_prompt": options.negative,
        "guidance": guidance[0] if guidance and len(guidance) == 1 else guidance,
        "guidance_policy": policy and " ".join(policy),
        **{name: getattr(options, name) for name in ("guidance_interval", "steps", "solver", "eta", "spacing")},
        **{name: getattr(options, name) for name in ("preset", "cache", *SETTINGS)},
    }


def _sample_shards(options: argparse.Namespace) -> int:
    if options.count is None or options.shards is None:
        raise UsageError("shards need both --count N and --shards DIR")
    if options.workers is not None and (options.ray is None or options.workers < 1):
        raise UsageError(f"--workers is {options.workers}; expected 1 or more, and --ray")
    single = ["condition", "negative_condition", "latents", "image", "mask", "strength"]
    single += ["output"] if options.output != OUTPUT else []
    if refused := [name for name in single if getattr(options, name)]:
        raise UsageError(f"--{refused[0].replace('_', '-')} does not go with --shards")
    for name in ("seed", "guidance", "negative"):
        if len(getattr(options, name) or ()) > 1:
            raise UsageError(f"--{name} has several values; expected one for all shards")
    fields = {name: value for name, value in _fields(options).items() if value is not None}
    contract = manifest.read(options.bundle, public_key=options.public_key)
    series = shards.plan(
        options.bundle,
        contract,
        options.labels,
        options.prompt,
        count=options.count,
        size=shards.SIZE if options.shard_size is None else options.shard_size,
        batch=shards.BATCH if options.batch is None else options.batch,
        seed=options.seed[0],
        fields=fields | ({"size": contract.at(options.size).size} if options.size else {}),
    )
    shards.begin(options.shards, series)
    todo = shards.missing(options.shards, series, shape := shards.picture_shape(contract, series))
    progress = Progress(quiet=options.quiet)
    counted = Counted(progress, "pictures")
    if todo and options.ray is not None:
        opening = {name: getattr(options, name) for name in ("threads", "provider", "low_memory", "public_key")}
        cluster.run(
            options.bundle,
            series,
            options.shards,
            todo,
            counted,
            address=options.ray or None,
            workers=options.workers,
            options=opening,
        )
    elif todo:
        with load_bundle(options) as pipe:
            shards.run(pipe, series, options.shards, todo, counted)
    progress.end()
    if lost := shards.missing(options.shards, series, shape):
        raise GateError(f"{options.shards}: {len(lost)} shards that were drawn are not here: is it a shared folder?")
    shards.clean(options.shards)
    table = {"output": str(options.shards), "count": series.count, "shards": len(series.shards), "drawn": len(todo)}
    answer(options, table, str(options.shards))
    return 0


def _write_png(path: Path, pictures: np.ndarray) -> None:
    images.write_png(path, images.grid(pictures))
