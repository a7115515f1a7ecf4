"""The options that make a recipe, for `build` and `quantize`."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from dit_export.networks.spec import CONDITIONINGS, MODELS
from dit_export.recipe import PRECISIONS, Recipe
from dit_runtime import backends
from dit_runtime.cli import add_tuning
from dit_runtime.sampling.process import PREDICTIONS


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help=f"{', '.join(MODELS)}, or a recipe.toml; a checkpoint states its own")
    parser.add_argument("--conditioning", help=f"{', '.join(CONDITIONINGS)}; a checkpoint states its own")
    parser.add_argument(
        "--resolution",
        action="extend",
        type=lambda text: [int(size) if size.isdecimal() else size for size in text.split(",")],
        help="of the pictures, or HEIGHTxWIDTH; default: the checkpoint's, or 256. Several, with commas or more "
        "flags, are sizes of one bundle; the first is its default",
    )
    parser.add_argument("--frames", type=int, metavar="N", help="of a video; default: as the checkpoint's pipeline")
    parser.add_argument("--precision", help=", ".join(PRECISIONS))
    parser.add_argument("--backend", help=f"auto, {', '.join(backends.BACKENDS)}")
    parser.add_argument(
        "--checkpoint", metavar="PATH|ID[@REVISION]", help="diffusers folder, Meta's .pt, .safetensors, id on the hub"
    )
    parser.add_argument(
        "--pipeline",
        metavar="FOLDER",
        help="a pipeline of diffusers whose transformer has no family; short runs of it are recorded",
    )
    parser.add_argument("--vae", metavar="PATH|ID[@REVISION]", help="the VAE of a checkpoint that holds none")
    parser.add_argument("--labels", metavar="FILE", help="class names: one a line, or JSON")
    parser.add_argument("--heads", type=int, help="attention heads, where the checkpoint's size is in no table")
    parser.add_argument(
        "--caption-tokens", type=int, metavar="N", help="of a prompt embedding; default: as the checkpoint's pipeline"
    )
    parser.add_argument(
        "--embedded-guidance",
        type=float,
        metavar="X",
        help="freeze the weight of guidance that the network reads; requests then guide by a negative (true_cfg_scale)",
    )
    parser.add_argument(
        "--prediction", help=f"what the network predicts, for checkpoints without a scheduler: {', '.join(PREDICTIONS)}"
    )
    parser.add_argument("--calibration", metavar="FILE", help="of an earlier int8 build; default: calibrate again")
    parser.add_argument(
        "--conditions",
        metavar="FILE.npz",
        help="calibration set of int8: arrays by port name, and negative.NAME; of more rows, 20 are used",
    )
    parser.add_argument("--keep-float", nargs="+", metavar="LAYER", help='int8: blocks.3, fc2, "decoder up"')
    parser.add_argument(
        "--strict", action="store_true", default=None, help="int8, fp8: fail where a gate needs other layers in float"
    )
    parser.add_argument(
        "--judge",
        metavar="FILE.onnx",
        help="classifier to store in the bundle; FILE.npz in its folder has mu and sigma of real pictures",
    )
    parser.add_argument(
        "--presets", metavar="FILE.json", help="for the bundle, as `dit-export tune --presets` writes them"
    )
    parser.add_argument("--synthetic", type=int, nargs="?", const=0, metavar="SEED", help="random weights")
    parser.add_argument("--latents-only", action="store_true", default=None, help="build no decoder")
    parser.add_argument(
        "--encoder", action="store_true", default=None, help="build the VAE's encoder too, for pictures to start from"
    )
    text = "decode and encode larger pictures in tiles of so many pixels, blended over their seams, to bound memory"
    parser.add_argument("--tile", type=int, metavar="PIXELS", help=text)
    parser.add_argument(
        "--without-text-encoders", action="store_true", default=None, help="for prompt embeddings, not prompts"
    )
    parser.add_argument("--max-batch", type=int, help="pictures the denoiser takes at a time; default 8")
    parser.add_argument("-o", "--output", metavar="DIR", help="default: a folder in engines/build")
    parser.add_argument("--json", action="store_true", help="the checks, for machines, on standard output")
    add_tuning(parser)


def read_recipe(options: argparse.Namespace) -> Recipe:
    """Return the recipe file's fields, overridden by the flags."""
    recipe, flags = Recipe(), {field.name: getattr(options, field.name) for field in fields(Recipe)}
    if options.resolution and len(options.resolution) == 1:
        flags["resolution"] = options.resolution[0]
    if options.model and options.model.endswith(".toml"):
        recipe, flags["model"] = Recipe.from_toml(Path(options.model)), None
    return replace(recipe, **{name: value for name, value in flags.items() if value is not None})
