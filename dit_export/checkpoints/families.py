"""Transformers of diffusers that run as diffusers' own modules: config and weights, read strictly and offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.modeling_utils import no_init_weights
from torch import nn

from dit_export.checkpoints.diffusers import CLASSES, read_config
from dit_export.checkpoints.files import check, find_weights, first_line, read_json, read_weights
from dit_export.networks import Network
from dit_export.networks.families import FAMILIES, Family
from dit_export.recipe import Recipe, sides
from dit_runtime.errors import UsageError


def class_name(folder: Path) -> Any:
    config = read_json(folder / "config.json")
    return config.get("_class_name") if isinstance(config, dict) else None


def read_family(folder: Path, recipe: Recipe) -> tuple[Network, list[Path], Family]:
    """Read the transformer in `folder` as a Network, for images of the recipe's resolution."""
    config = read_config(folder, *CLASSES, *FAMILIES)
    where, family = str(folder / "config.json"), FAMILIES[config["_class_name"]]
    for field, values in family.supported.items():
        if config[field] not in values:
            raise UsageError(f"{where}: {field} is {config[field]!r}, expected {' or '.join(map(repr, values))}")
    files = find_weights(folder)
    transformer = read_module(family.name, config, files, where)
    size = sides(recipe.resolution) if recipe.resolution else (config["sample_size"],) * 2
    tokens = recipe.caption_tokens or caption_tokens(folder.parent, family)
    return family.network(transformer, size, tokens), files, family


def read_module(name: str, config: dict[str, Any], files: list[Path], where: str) -> nn.Module:
    """Build diffusers' own module and give it exactly the weights of the files, in float32."""
    try:
        with no_init_weights():  # memory that nothing has written yet costs nothing
            module = getattr(diffusers, name).from_config(config)
    except (TypeError, ValueError, ArithmeticError, NotImplementedError) as error:
        raise UsageError(f"{where}: {name} refuses it: {first_line(error)}") from None
    state = read_weights(files)
    check(state, {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}, where)
    module.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
    return module.eval().requires_grad_(False)


def caption_tokens(pipeline: Path, family: Family) -> int:
    """Return how many tokens a caption has in the pipeline around a transformer."""
    index = pipeline / "model_index.json"
    name = read_json(index).get("_class_name") if index.is_file() else None
    return family.tokens.get(str(name), next(iter(family.tokens.values())))
