"""The options that make a recipe, for `build` and `quantize`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from dit_export.networks.spec import CONDITIONINGS, MODELS
from dit_export.recipe import PRECISIONS, Recipe
from dit_runtime.cli import add_backend, add_tuning
from dit_runtime.options import Known, Parser
from dit_runtime.sampling.process import PREDICTIONS

Add = Callable[..., object]


def add_recipe(parser: Parser) -> None:
    text = f"{', '.join(MODELS)}, or a recipe, FILE.toml; a checkpoint states its own"
    parser.add_argument("model", nargs="?", type=Known(MODELS), metavar="MODEL", help=text)
    _add_weights(parser.add_argument_group("weights").add_argument)
    _add_network(parser.add_argument_group("network").add_argument)
    _add_parts(parser.add_argument_group("text encoders and VAE").add_argument)
    group = parser.add_argument_group("precision")
    group.add_argument(
        "--precision", type=Known(PRECISIONS), metavar="NAME", help=f"{', '.join(PRECISIONS)}; default: fp32"
    )
    _add_quantization(group.add_argument)
    add_backend(parser.add_argument_group("backend"))
    add_tuning(parser)
    _add_output(parser.add_argument_group("output").add_argument)


def _add_weights(add: Add) -> None:
    text = "folder of diffusers, Meta's .pt, .safetensors, or ID[@REVISION] on the hub"
    add("--checkpoint", metavar="CHECKPOINT", help=text)
    text = "folder of a diffusers pipeline of a class that --checkpoint lacks; the build records short runs of it"
    add("--pipeline", metavar="FOLDER", help=text)
    add("--vae", metavar="CHECKPOINT", help="the VAE, for a checkpoint without one")
    add("--labels", metavar="FILE", help="class names: one a line, or JSON")
    add("--synthetic", type=int, nargs="?", const=0, metavar="N", help="take random weights; N is the seed, else 0")


def _add_network(add: Add) -> None:
    ways = tuple(CONDITIONINGS)
    text = f"how timestep and label enter: {', '.join(ways)}; a checkpoint states its own"
    add("--conditioning", type=Known(ways), metavar="NAME", help=text)
    add(
        "--resolution",
        action="extend",
        type=lambda text: [int(size) if size.isdecimal() else size for size in text.split(",")],
        metavar="SIZE[,SIZE]",
        help="pixels of the pictures: 512, or 512x768 for height x width; a bundle can have several sizes, and draws "
        "the first unless a request names another; default: the checkpoint's, or 256",
    )
    add("--frames", type=int, metavar="N", help="frames of a video; default: as the checkpoint's pipeline")
    add("--heads", type=int, metavar="N", help="attention heads, for a checkpoint whose width is not one of MODEL's")
    text = "tokens of a prompt embedding; default: as the checkpoint's pipeline"
    add("--caption-tokens", type=int, metavar="N", help=text)
    text = "freeze the weight that a network with embedded guidance reads; guidance then mixes two predictions"
    add("--embedded-guidance", type=float, metavar="X", help=text)
    names = tuple(PREDICTIONS)
    text = f"what the network predicts, for a checkpoint without a scheduler: {', '.join(names)}"
    add("--prediction", type=Known(names), metavar="NAME", help=text)
    add("--max-batch", type=int, metavar="N", help="largest batch of the denoiser; default: 8")


def _add_parts(add: Add) -> None:
    text = "build no text encoders: the bundle takes prompt embeddings"
    add("--without-text-encoders", action="store_true", default=None, help=text)
    text = "build no decoder: the bundle gives latents"
    add("--latents-only", action="store_true", default=None, help=text)
    text = "build the VAE's encoder too, for pictures to start from"
    add("--encoder", action="store_true", default=None, help=text)
    text = "decode and encode larger pictures in tiles of N pixels a side, in less memory"
    add("--tile", type=int, metavar="N", help=text)


def _add_quantization(add: Add) -> None:
    text = "the calibration of an earlier int8 build; default: calibrate again"
    add("--calibration", metavar="FILE.npz", help=text)
    text = "conditions to calibrate int8 with: arrays named as the ports, or negative.PORT; at most 20 rows are used"
    add("--conditions", metavar="FILE.npz", help=text)
    text = 'layers that int8 and fp8 leave in float: blocks.3, fc2, "decoder up"'
    add("--keep-float", nargs="+", metavar="LAYER", help=text)
    text = "fail if int8 or fp8 misses its gates; default: keep the fewest layers in float that pass"
    add("--strict", action="store_true", default=None, help=text)


def _add_output(add: Add) -> None:
    add("-o", "--output", metavar="FOLDER", help="the bundle; default: a folder in engines/build")
    text = "classifier to store in the bundle; FILE.npz in its folder has mu and sigma of real pictures"
    add("--judge", metavar="FILE.onnx", help=text)
    text = "presets to store in the bundle, from `dit-export tune --presets`"
    add("--presets", metavar="FILE.json", help=text)


def read_recipe(options: argparse.Namespace) -> Recipe:
    """Return the recipe file's fields, overridden by the flags."""
    recipe, flags = Recipe(), {field.name: getattr(options, field.name) for field in fields(Recipe)}
    if options.resolution and len(options.resolution) == 1:
        flags["resolution"] = options.resolution[0]
    if options.model and options.model.endswith(".toml"):
        recipe, flags["model"] = Recipe.from_toml(Path(options.model)), None
    return replace(recipe, **{name: value for name, value in flags.items() if value is not None})
