"""`dit-run sample`: pictures from prompts, classes or arrays, as files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dit_runtime import images
from dit_runtime.errors import UsageError
from dit_runtime.files import read_array, read_condition
from dit_runtime.options import add_bundle, add_size, load_bundle
from dit_runtime.progress import Progress
from dit_runtime.request import Request
from dit_runtime.sampling.caches import CACHES, SETTINGS
from dit_runtime.sampling.guidance import POLICIES
from dit_runtime.sampling.process import FLOW_SPACINGS, SOLVERS, SPACINGS


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
        help=f"{', '.join(POLICIES)}, with numbers that are not the defaults",
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
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("sample.png"),
        help=".png (a grid), .npz, .npy (latents), .mp4 of videos, or a folder for a .png of each image or frame",
    )
    parser.add_argument("--fps", type=int, default=25, help="frames a second of .mp4")


def run(options: argparse.Namespace) -> int:
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
    with load_bundle(options, options.size) as pipe:
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


def _write_png(path: Path, pictures: np.ndarray) -> None:
    images.write_png(path, images.grid(pictures))
