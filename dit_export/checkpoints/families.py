"""Transformers of diffusers that run as diffusers' own modules: config and weights, read strictly and offline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn

from dit_export.checkpoints.diffusers import CLASSES, read_config
from dit_export.checkpoints.files import Renamed, check, find_weights, first_line, open_weights, read_json
from dit_export.networks import Network
from dit_export.networks.families import FAMILIES, family_network
from dit_export.networks.families.family import Family
from dit_export.networks.streaming import stream
from dit_export.recipe import Recipe, latent_size
from dit_runtime.errors import UsageError


def class_name(folder: Path) -> Any:
    config = read_json(folder / "config.json")
    return config.get("_class_name") if isinstance(config, dict) else None


def read_family(folder: Path, recipe: Recipe) -> tuple[Network, list[Path], Family]:
    """Read the transformer in `folder` as a Network, for images of the recipe's resolution."""
    config = read_config(folder, *CLASSES, *FAMILIES)
    family, files, where = FAMILIES[config["_class_name"]], find_weights(folder), str(folder / "config.json")
    transformer, weights = make_module(family.name, config, where), open_weights(files)
    check(weights, {key: tuple(tensor.shape) for key, tensor in transformer.state_dict().items()}, where)
    buffers = dict(transformer.named_buffers())
    transformer.load_state_dict({key: weights[key].float() for key in buffers.keys() & weights.keys()}, strict=False)
    size = latent_size(recipe.resolution) if recipe.resolution else None
    tokens = caption_tokens(folder.parent, family) if recipe.caption_tokens is None else recipe.caption_tokens
    try:
        network = family_network(transformer, size, tokens)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return streamed(network, transformer, weights), files, family


def make_module(name: str, config: Mapping[str, Any], where: str) -> nn.Module:
    """Build diffusers' own module, with parameters that nothing has written yet and that so take no memory."""
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with no_init_weights():
            module: nn.Module = getattr(diffusers, name)(**fields)
    except (TypeError, ValueError, ArithmeticError, NotImplementedError) as error:
        raise UsageError(f"{where}: {name} refuses it: {first_line(error)}") from None
    return module


def streamed(network: Network, transformer: nn.Module, weights: Mapping[str, Tensor]) -> Network:
    """Let the network read the transformer's weights part by part, whenever it runs or its graph is written."""
    names = {parameter: name for name, parameter in transformer.named_parameters(remove_duplicate=False)}
    inside = network.module.named_parameters(remove_duplicate=False)
    paths = {path: names[parameter] for path, parameter in inside if parameter in names}
    stream(transformer, weights)
    return replace(network, weights=Renamed(weights, paths))


def caption_tokens(pipeline: Path, family: Family) -> int:
    """Return how many tokens a caption has in the pipeline around a transformer."""
    index = pipeline / "model_index.json"
    name = read_json(index).get("_class_name") if index.is_file() else None
    return family.tokens.get(str(name), family.default_tokens)
