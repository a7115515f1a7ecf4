"""A folder that diffusers wrote: a whole pipeline, or its transformer alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from dit_export.checkpoints import keys
from dit_export.checkpoints.files import find_weights, first_line, read_weights
from dit_export.checkpoints.scheduler import read_scheduler_config
from dit_export.checkpoints.schema import INDEX, read_config_json
from dit_export.networks.dit import DiT
from dit_export.networks.spec import ModelSpec, at_resolution
from dit_runtime.errors import UsageError
from dit_runtime.sampling.process import Process

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
    "norm_type": "ada_norm_zero",
    "caption_channels": None,
    "cross_attention_dim": None,
}
ABSENT = {"interpolation_scale": (None, 1, 1.0), "use_additional_conditions": (None, False)}
NUMBERS = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "num_layers",
    "sample_size",
    "patch_size",
)
COUNTS = ("num_embeds_ada_norm", "low_channels")  # they may be 0
OURS = {"low_channels": 0}  # fields that diffusers' class ignores, with a warning: see ModelSpec
SCHEDULER = "scheduler/scheduler_config.json"
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
RETIRED = {"QwenImageTransformer2DModel": ("pooled_projection_dim",)}  # fields of published configs that nothing reads
# Read by no forward pass in fp32: dropout, norm_num_groups, upcast_attention. The rest: out_channels, norm_eps.


def class_name(folder: Path) -> Any:
    """Return the class of a config in today's diffusers, which reads PixArt's published ones as its own class."""
    config = read_config_json(folder / "config.json")
    older = config.get("_class_name") == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single"
    return "PixArtTransformer2DModel" if older else config.get("_class_name")


def read_config(folder: Path, *classes: str, more: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """config.json with its class's defaults, and those of `more` fields, filled in; unknown ones are refused."""
    where = folder / "config.json"
    name, config = class_name(folder), read_config_json(where)
    if name not in classes:
        raise UsageError(f"{where}: _class_name is {name!r}, expected {' or '.join(classes)}")
    signature = inspect.signature(getattr(diffusers, name).__init__)
    fields = {key: parameter.default for key, parameter in signature.parameters.items() if key != "self"}
    fields |= more
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    idle = {key for key in config.keys() - fields.keys() if key in FIXED and config[key] == FIXED[key]}
    config = {key: value for key, value in config.items() if key not in idle.union(RETIRED.get(name, ()))}
    if unknown := sorted(config.keys() - fields.keys()):
        raise UsageError(f"{where}: {name} has no field {', '.join(unknown)}; known: {', '.join(fields)}")
    return fields | config | {"_class_name": name}


def build_module(name: str, config: Mapping[str, Any], where: str) -> nn.Module:
    """Build diffusers' own module of a config; its weights are memory that nothing has written yet."""
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with no_init_weights():
            module: nn.Module = getattr(diffusers, name)(**fields)
    except Exception as error:  # what its constructors raise of a config shares no base class but this
        raise UsageError(f"{where}: {name} refuses it: {first_line(error)}") from None
    return module


def read_transformer(folder: Path, resolution: int | str | None = None) -> tuple[DiT, list[Path]]:
    """Read a class-conditional DiT; for another size than the trained one, spread positions as diffusers does."""
    config = read_config(folder, *CLASSES, more=OURS)
    where = f"{folder / 'config.json'}"
    allowed = {key: (value,) for key, value in FIXED.items()} | ABSENT
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise UsageError(f"{where}: {key} is {config[key]!r}, expected {values[0]!r}")
    for key in (*NUMBERS, *COUNTS):
        if type(config[key]) is not int or config[key] < (key in NUMBERS):
            what = "a positive whole number" if key in NUMBERS else "a whole number"
            raise UsageError(f"{where}: {key} is {config[key]!r}, expected {what}")
    if not isinstance(config["norm_eps"], float) or config["norm_eps"] <= 0:
        raise UsageError(f"{where}: norm_eps is {config['norm_eps']!r}, expected a small positive number")
    channels, size = config["in_channels"] - config["low_channels"], config["sample_size"]
    if channels < 1:
        raise UsageError(f"{where}: low_channels is {config['low_channels']}, expected less than in_channels")
    out_channels = config["in_channels"] if config["out_channels"] is None else config["out_channels"]
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
        low_channels=config["low_channels"],
        learned_variance=out_channels == 2 * channels,
        frequency_shift=1,
        norm2_eps=config["norm_eps"],
        guided_channels=channels,
        unguided_up_to_one=True,
        position_span=size // config["patch_size"],
    )
    files = find_weights(folder)
    state = read_weights(files)
    return keys.read(state, keys.DIFFUSERS, at_resolution(spec, resolution), str(folder)), files


def read_scheduler(folder: Path) -> Any:
    """Return the scheduler's config of a pipeline; None where it has none."""
    path = folder / SCHEDULER
    return read_config_json(path) if path.exists() else None


def read_process(
    folder: Path | None,
    learned_variance: bool = True,
    prediction: str | None = None,
    otherwise: Mapping[str, Any] | None = None,
    **flow: Any,
) -> Process:
    """Read the pipeline's scheduler; without one, read the config `otherwise`, or return Meta's constants.

    `flow` is what only a pipeline's code says of a flow: see `read_scheduler_config`.
    """
    config = read_scheduler(folder) if folder is not None else None
    if config is None and folder is not None and (folder / INDEX).is_file():
        raise UsageError(f"{folder / SCHEDULER}: not there, and {folder} is a whole pipeline that needs it")
    config = otherwise if config is None else config
    return read_scheduler_config(config, learned_variance=learned_variance, prediction=prediction, **flow)
