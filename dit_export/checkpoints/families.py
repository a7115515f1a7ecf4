"""Transformers of diffusers that run as diffusers' own modules: config and weights, read strictly and offline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from dit_export.checkpoints.diffusers import CLASSES, build_module, read_config, read_scheduler
from dit_export.checkpoints.files import Renamed, check, find_weights, open_weights
from dit_export.checkpoints.schema import read_index
from dit_export.networks import Network
from dit_export.networks.families import FAMILIES, family_network
from dit_export.networks.families.family import Family
from dit_export.networks.streaming import stream
from dit_export.recipe import Recipe, latent_size
from dit_runtime.errors import UsageError


def read_family(folder: Path, recipe: Recipe) -> tuple[Network, list[Path], Family, nn.Module]:
    """Read the transformer in `folder` as a Network, for images of the recipe's resolution."""
    transformer, weights, files = read_module(folder, *CLASSES, *FAMILIES)
    family, where = FAMILIES[type(transformer).__name__], str(folder / "config.json")
    names = parameter_names(transformer)
    size = state_size(recipe, family)
    tokens = caption_tokens(folder.parent, family) if recipe.caption_tokens is None else recipe.caption_tokens
    try:
        network = family_network(transformer, size, tokens)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    network = streamed(network, weights, names)
    if family.distilled(read_index(folder.parent), read_scheduler(folder.parent) or {}):
        network = replace(network, guidance=1.0, model={**network.model, "distilled": True})
    return network, files, family, transformer


def read_module(folder: Path, *classes: str) -> tuple[nn.Module, Mapping[str, Tensor], list[Path]]:
    """Return a module of diffusers whose parameters are still to be read, its weights by name, and their files."""
    config, files, where = read_config(folder, *classes), find_weights(folder), str(folder / "config.json")
    module, weights = build_module(config["_class_name"], config, where), open_weights(files)
    check(weights, {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}, where)
    buffers = weights.keys() - parameter_names(module).values()
    module.load_state_dict({key: weights[key].float() for key in buffers}, strict=False)
    return module, weights, files


def state_size(recipe: Recipe, family: Family) -> tuple[int, ...] | None:
    """Return (H, W) of the latents, of videos (F, H, W); None where the recipe leaves both to the family."""
    sides = latent_size(recipe.resolution, family.pixels) if recipe.resolution else None
    if family.video is None:
        return sides
    if recipe.frames is not None and (recipe.frames < 1 or (recipe.frames - 1) % family.frames):
        near = f"{family.frames + 1} or {2 * family.frames + 1}"
        raise UsageError(f"frames {recipe.frames}; expected 1, or a multiple of {family.frames} more, such as {near}")
    times = family.video[0] if recipe.frames is None else (recipe.frames - 1) // family.frames + 1
    return times, *(sides or family.video[1:])


def parameter_names(transformer: nn.Module) -> dict[nn.Parameter, str]:
    """Return what a checkpoint calls the parameters, which a family may hold under other names."""
    return {parameter: name for name, parameter in transformer.named_parameters(remove_duplicate=False)}


def streamed(network: Network, weights: Mapping[str, Tensor], names: Mapping[nn.Parameter, str]) -> Network:
    """Let the network read weights, by their names in the checkpoint, whenever a part runs or its graph is written."""
    inside = network.module.named_parameters(remove_duplicate=False)
    renamed = Renamed({path: (weights, names[parameter]) for path, parameter in inside if parameter in names})
    stream(network.module, renamed)
    return replace(network, weights=renamed)


def caption_tokens(pipeline: Path, family: Family) -> int:
    """Return how many tokens a caption has in the pipeline around a transformer."""
    return family.tokens.get(str(read_index(pipeline).get("_class_name")), family.default_tokens)
