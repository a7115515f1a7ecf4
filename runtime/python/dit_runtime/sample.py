"""`dit-run sample`: pictures from prompts, classes or arrays, as files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime import cluster, images, shards
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.errors import GateError, UsageError
from dit_runtime.facts import DEFAULT_STRENGTH
from dit_runtime.npy import read_array, read_condition
from dit_runtime.options import add_bundle, add_size, load_bundle
from dit_runtime.picture_files import read_mask, read_picture
from dit_runtime.progress import Counted, Progress
from dit_runtime.request import Request
from dit_runtime.sampling.caches import CACHES, SETTINGS
from dit_runtime.sampling.guidance import POLICIES
from dit_runtime.sampling.process import FLOW_SPACINGS, SOLVERS, SPACINGS

OUTPUT = Path("sample.png")


def add_options(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument("--labels", nargs="+", default=[], metavar="CLASS", help="names or numbers, one a picture")
    parser.add_argument(
        "--condition",
        nargs="+",
        default=[],
        metavar="NAME=FILE.npy",
        help="arrays by port, rows first, a picture a row; or one FILE.npz of them",
    )
    parser.add_argument("--negative-condition", nargs="+", default=[], metavar="NAME=FILE.npy", help="for guidance")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="one a picture")
    parser.add_argument("--negative", nargs="+", metavar="TEXT", help="one for all, or one a picture; default: none")
    add_size(parser)
    parser.add_argument("--preset", help="values for the options below, as `dit-run info` lists them; yours win")
    parser.add_argument("--steps", type=int, help="default: the bundle's")
    parser.add_argument(
        "--guidance", "--cfg-scale", type=float, nargs="+", help="one, or one a picture; default: the bundle's"
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide the steps between these fractions of the time; others evaluate half the rows. Default: 0 1",
    )
    parser.add_argument(
        "--guidance-policy",
        nargs="+",
        metavar=("NAME", "KEY=VALUE"),
        help=f"{', '.join(POLICIES)}; KEY=VALUE replaces a default",
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one for all, or one a picture")
    parser.add_argument("--solver", help=f"{', '.join(SOLVERS)}; default: the bundle's")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0 to 1")
    spacings = ", ".join(dict.fromkeys(SPACINGS + FLOW_SPACINGS))
    parser.add_argument("--spacing", help=f"of the timesteps: {spacings}; or the times themselves: 999,640,300")
    text = f"of outputs: {', '.join(CACHES)}, which decides for all pictures of a request at once; default: none"
    parser.add_argument("--cache", help=text)
    parser.add_argument("--cache-interval", type=int, metavar="N", help="taylorseer evaluates each step of N")
    parser.add_argument("--max-order", type=int, metavar="N", help="of taylorseer, 0 to 2")
    parser.add_argument("--disable-cache-before-step", type=int, metavar="STEP")
    parser.add_argument("--disable-cache-after-step", type=int, metavar="STEP", help="below 0: from the end")
    parser.add_argument("--cache-threshold", type=float, metavar="X", help="the error that easycache lets grow")
    parser.add_argument("--latents", type=Path, metavar="FILE.npy", help="start from these instead of the seed's")
    text = "start from pictures in PNG, JPEG or WebP, one for all or one a picture, stretched to the bundle's size; or"
    text += " with a bundle for super-resolution, enlarge them"
    parser.add_argument("--image", type=Path, nargs="+", metavar="FILE", help=text)
    text = f"share of the steps that run, from --image on; default: {DEFAULT_STRENGTH:g}"
    parser.add_argument("--strength", type=float, metavar="X", help=text)
    text = "redraw where it is white, or where it is transparent if it has transparent pixels; keep the rest of --image"
    parser.add_argument("--mask", type=Path, nargs="+", metavar="FILE", help=text)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=OUTPUT,
        help=".png (a grid), .npz, .npy (latents), .mp4 of videos, or a folder for a .png of each image or frame",
    )
    many = parser.add_argument_group("many pictures", "shards to score; the same command resumes a run that was killed")
    many.add_argument("--count", type=int, metavar="N", help="picture i has seed + i, and labels or prompts in turn")
    many.add_argument("--shards", type=Path, metavar="DIR", help="a .npz a shard: arr_0, arr_1 (classes), seeds")
    many.add_argument("--shard-size", type=int, metavar="N", help=f"pictures a shard; default: {shards.SIZE}")
    many.add_argument("--batch", type=int, metavar="N", help=f"pictures a call; default: {shards.BATCH}")
    text = "draw on a Ray cluster; without ADDRESS the one of RAY_ADDRESS, or a new one of this machine"
    many.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help=text)
    many.add_argument("--workers", type=int, metavar="N", help="of the cluster; default: one a machine, or one a GPU")
    parser.add_argument("--fps", type=int, default=25, help="frames a second of .mp4")


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
    progress = Progress()
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
    if options.json:
        print(json.dumps({"output": str(options.output), "shape": list(result.shape), "rows": trajectory.rows}))
    else:
        print(options.output)
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
    progress = Progress()
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
    if options.json:
        table = {"output": str(options.shards), "count": series.count, "shards": len(series.shards), "drawn": len(todo)}
        print(json.dumps(table))
    else:
        print(options.shards)
    return 0


def _write_png(path: Path, pictures: np.ndarray) -> None:
    images.write_png(path, images.grid(pictures))
