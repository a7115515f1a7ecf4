"""A folder that diffusers wrote: a whole pipeline, or its transformer alone."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_export.checkpoints import keys
from dit_export.checkpoints.files import find_weights, read_json, read_weights
from dit_export.checkpoints.scheduler import read_scheduler_config
from dit_export.networks.dit import DiT, timestep_frequencies
from dit_export.spec import ModelSpec, conditioned, sized
from dit_runtime.errors import UsageError
from dit_runtime.sampling.schedule import Diffusion

# Fields with one supported value, of every class that is read; the older class has those from attention_type on.
FIXED: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "attention_type": "default",
    "num_vector_embeds": None,
    "double_self_attention": False,
    "only_cross_attention": False,
    "use_linear_projection": False,
}
OF_CLASSES = {"norm_type": "ada_norm_zero", "caption_channels": None, "cross_attention_dim": None}
OF_CAPTIONS = {"norm_type": "ada_norm_single", "norm_eps": 1e-6}
TOLD_SIZE = 128  # of latents, from which on networks are told the pictures' size and shape, where config is silent
ABSENT = {"interpolation_scale": (None, 1, 1.0), "use_additional_conditions": (None, False)}
NUMBERS = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "num_layers",
    "sample_size",
    "patch_size",
    "num_embeds_ada_norm",
)
TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # of a caption
CAPTIONED = "PixArtTransformer2DModel"
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
# Read by no forward pass in fp32: dropout, norm_num_groups, upcast_attention. The rest: out_channels, norm_eps.


def read_config(folder: Path, *classes: str) -> dict[str, Any]:
    """config.json with its class's defaults filled in; a class or a field that we do not know is refused."""
    where = folder / "config.json"
    given = read_json(where)
    name = given.get("_class_name") if isinstance(given, dict) else None
    if name not in classes:
        raise UsageError(f"{where}: _class_name is {name!r}, expected {' or '.join(classes)}")
    signature = inspect.signature(getattr(diffusers, name).__init__)
    fields = {key: parameter.default for key, parameter in signature.parameters.items() if key != "self"}
    given = {key: value for key, value in given.items() if not key.startswith("_")}
    if unknown := sorted(given.keys() - fields.keys()):
        raise UsageError(f"{where}: {name} has no field {', '.join(unknown)}; known: {', '.join(fields)}")
    return fields | given | {"_class_name": name}


def read_transformer(folder: Path, resolution: int | str | None = None) -> tuple[DiT, list[Path]]:
    """A network of classes or of captions, by its config.json; for pictures of another size than it was trained on,
    positions are spread as diffusers spreads them."""
    config = read_config(folder, *CLASSES, CAPTIONED)
    captioned = config["_class_name"] == CAPTIONED
    where = f"{folder / 'config.json'}"
    fixed = FIXED | (OF_CAPTIONS if captioned else OF_CLASSES)
    allowed = {key: (value,) for key, value in fixed.items()} | ({} if captioned else ABSENT)
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise UsageError(f"{where}: {key} is {config[key]!r}, expected {values[0]!r}")
    for key in (*NUMBERS, "caption_channels", "cross_attention_dim") if captioned else NUMBERS:
        if type(config[key]) is not int or config[key] < 1:
            raise UsageError(f"{where}: {key} is {config[key]!r}, expected a positive whole number")
    if not isinstance(config["norm_eps"], float) or config["norm_eps"] <= 0:
        raise UsageError(f"{where}: norm_eps is {config['norm_eps']!r}, expected a small positive number")
    channels, size = config["in_channels"], config["sample_size"]
    out_channels = channels if config["out_channels"] is None else config["out_channels"]
    if out_channels not in (channels, 2 * channels):
        raise UsageError(f"{where}: out_channels is {out_channels!r}, expected {channels} or {2 * channels}")
    spec = ModelSpec(
        depth=config["num_layers"],
        hidden=config["num_attention_heads"] * config["attention_head_dim"],
        heads=config["num_attention_heads"],
        patch=config["patch_size"],
        latent_size=size,
        channels=channels,
        num_classes=config["num_embeds_ada_norm"],
        learned_variance=out_channels == 2 * channels,
        frequency_shift=1,
        norm2_eps=config["norm_eps"],
        guided_channels=channels,
        unguided_up_to_one=True,
        position_span=size // config["patch_size"],
    )
    files = find_weights(folder)
    state = read_weights(files)
    if not captioned:
        return keys.read(state, keys.DIFFUSERS, sized(spec, resolution), str(folder)), files
    if config["cross_attention_dim"] != spec.hidden:
        got = config["cross_attention_dim"]
        raise UsageError(f"{where}: cross_attention_dim is {got}, expected {spec.hidden}, which captions become")
    spec = replace(
        sized(conditioned(spec, "adaln-single"), resolution),
        frequency_shift=0,
        caption_tokens=caption_tokens(folder.parent),
        caption_channels=config["caption_channels"],
        position_span=spec.position_span / (config["interpolation_scale"] or max(size // 64, 1)),
    )
    told = config["use_additional_conditions"]
    if size == TOLD_SIZE if told is None else told:
        fold_size(state, spec, str(folder))
    return keys.read(state, keys.PIXART, spec, str(folder)), files


def read_diffusion(folder: Path, learned_variance: bool, prediction: str | None = None) -> Diffusion:
    """The pipeline's scheduler; a transformer alone has none and gets Meta's constants."""
    path = folder / "scheduler" / "scheduler_config.json"
    if path.is_file():
        return read_scheduler_config(read_json(path), learned_variance=learned_variance, prediction=prediction)
    if (folder / "model_index.json").is_file():
        raise UsageError(f"{path}: not there, and {folder} is a whole pipeline that needs it")
    return read_scheduler_config(None, learned_variance=learned_variance, prediction=prediction)


def caption_tokens(pipeline: Path) -> int:
    """How many tokens the pipeline around a transformer gives it; where there is none, what PixArt-alpha's does."""
    index = pipeline / "model_index.json"
    name = read_json(index).get("_class_name") if index.is_file() else None
    return TOKENS.get(str(name), TOKENS["PixArtAlphaPipeline"])


def fold_size(state: dict[str, Tensor], spec: ModelSpec, where: str) -> None:
    """A network that is told the pictures' size and shape: in a bundle they are constant, so what becomes of them is a
    part of the timestep embedder's last bias."""
    height, width = (8.0 * side for side in spec.latent_shape[1:])
    found = []
    for name, values in (("resolution", [height, width]), ("aspect_ratio", [height / width])):
        angles = torch.tensor(values)[:, None] * timestep_frequencies(0)  # (values, half)
        x = torch.cat([angles.cos(), angles.sin()], dim=-1)
        for layer in ("linear_1", "linear_2"):
            prefix = f"adaln_single.emb.{name}_embedder.{layer}"
            weight, bias = (state.pop(f"{prefix}.{leaf}", None) for leaf in ("weight", "bias"))
            if weight is None or bias is None:
                raise UsageError(f"{where}: {prefix} is missing; config.json says that the network is told its size")
            x = F.linear(x if layer == "linear_1" else F.silu(x), weight.float(), bias.float())
        found.append(x.flatten())
    total = torch.cat(found)
    last = "adaln_single.emb.timestep_embedder.linear_2.bias"
    if last not in state or state[last].shape != total.shape:
        raise UsageError(f"{where}: size and shape become {len(total)} numbers, expected as many as {last} has")
    state[last] = state[last].float() + total
