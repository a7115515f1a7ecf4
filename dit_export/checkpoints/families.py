"""Transformers of diffusers that run as diffusers' own modules: config and weights, read strictly and offline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from dit_export.checkpoints.diffusers import CLASSES, read_config
from dit_export.checkpoints.files import check, find_weights, first_line, read_json, read_weights
from dit_export.networks import Network
from dit_export.networks.families import FAMILIES, family_network
from dit_export.networks.families.family import Family
from dit_export.recipe import Recipe, latent_size
from dit_runtime.errors import UsageError


def class_name(folder: Path) -> Any:
    config = read_json(folder / "config.json")
    return config.get("_class_name") if isinstance(config, dict) else None


def read_family(folder: Path, recipe: Recipe) -> tuple[Network, list[Path], Family, nn.Module]:
    """Read the transformer in `folder` as a Network, for images of the recipe's resolution."""
    config = read_config(folder, *CLASSES, *FAMILIES)
    family, files = FAMILIES[config["_class_name"]], find_weights(folder)
    transformer = read_module(family.name, config, files, str(folder / "config.json"))
    size = latent_size(recipe.resolution) if recipe.resolution else None
    tokens = caption_tokens(folder.parent, family) if recipe.caption_tokens is None else recipe.caption_tokens
    try:
        return family_network(transformer, size, tokens), files, family, transformer
    except UsageError as error:
        raise UsageError(f"{folder / 'config.json'}: {error}") from None


def read_module(name: str, config: Mapping[str, Any], files: list[Path], where: str) -> nn.Module:
    """Build diffusers' own module and give it exactly the weights of the files, in float32."""
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with no_init_weights():  # memory that nothing has written yet costs nothing
            module = getattr(diffusers, name)(**fields)
    except (TypeError, ValueError, ArithmeticError, NotImplementedError) as error:
        raise UsageError(f"{where}: {name} refuses it: {first_line(error)}") from None
    state = read_weights(files)
    check(state, {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}, where)
    module.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
    return module


def caption_tokens(pipeline: Path, family: Family) -> int:
    """Return how many tokens a caption has in the pipeline around a transformer."""
    index = pipeline / "model_index.json"
    name = read_json(index).get("_class_name") if index.is_file() else None
    return family.tokens.get(str(name), family.default_tokens)
