"""Checkpoints in, one network out: what the checkpoint is chooses its reader."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from dit_export.checkpoints import keys
from dit_export.checkpoints.diffusers import CLASSES, class_name, read_process, read_transformer
from dit_export.checkpoints.families import caption_tokens, read_family
from dit_export.checkpoints.files import sha256
from dit_export.checkpoints.hub import resolve_path
from dit_export.checkpoints.labels import pipeline_labels, read_labels
from dit_export.checkpoints.meta import read_file
from dit_export.checkpoints.synthetic import synthetic_dit, synthetic_vae
from dit_export.checkpoints.vae import read_vae
from dit_export.networks import Network, tiles
from dit_export.networks import spec as specs
from dit_export.networks.dit import DiT, dit_network, resized
from dit_export.networks.families.family import Family
from dit_export.networks.frozen import freeze_guidance
from dit_export.networks.spec import ModelSpec
from dit_export.networks.text import PromptEncoder
from dit_export.recipe import Recipe
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.bundle.records import count_classes
from dit_runtime.errors import UsageError
from dit_runtime.sampling.process import Process

OTHERWISE = (
    "pass --checkpoint PATH (make: CHECKPOINT=PATH), or --synthetic (make: SYNTHETIC=1) to build with made-up weights"
)
PUBLIC: dict[tuple[str, int | str], str] = {  # model, resolution -> the hub's checkpoint
    ("XL/2", 256): "facebook/DiT-XL-2-256",
    ("XL/2", 512): "facebook/DiT-XL-2-512",
}
LORA = "pytorch_lora_weights.safetensors"  # as diffusers saves adapters
KINDS = ("synthetic", "file", "diffusers", "pipeline")  # of a source that a recipe finds again


@dataclass(frozen=True)
class Loaded:
    """Hold what a build starts from."""

    network: Network
    vae: Any  # one of CODECS' classes, or None
    labels: tuple[str, ...]  # by id; () where unknown
    process: Process
    source: dict[str, Any]  # provenance, JSON-able
    text: PromptEncoder | None = None  # None: conditions are arrays
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # arrays by port, by file of the bundle
    note: str = ""  # what a user should know of it


def load(recipe: Recipe, size: int | str | None = None) -> Loaded:
    """Read the recipe's checkpoint, or the public one of its model; make weights up where the recipe says so.

    The network is for images of `size`, by default of the recipe's first resolution; its weights are the same at each.
    """
    loaded = _load(recipe, size)
    if recipe.embedded_guidance is not None:
        loaded = replace(loaded, network=freeze_guidance(loaded.network, recipe.embedded_guidance))
    if recipe.tile is not None:
        tiles.enable(loaded.vae, recipe.tile)
    return loaded


def _load(recipe: Recipe, size: int | str | None) -> Loaded:
    first = replace(recipe, resolution=recipe.sizes[0])
    recipe = first if size is None else replace(recipe, resolution=size)
    if recipe.latents_only and recipe.vae:
        raise UsageError(f"got both a VAE ({recipe.vae}) and --latents-only: pass one of them")
    if recipe.pipeline is not None:
        return load_pipeline(recipe)
    if recipe.synthetic is not None:
        return load_synthetic(recipe, first.resolution)
    checkpoint = recipe.checkpoint or public_checkpoint(first)
    parts = ["", "transformer/"] + ([] if recipe.latents_only or recipe.vae else ["vae/"])
    parts += [] if recipe.without_text_encoders else ["text_encoder*/", "tokenizer*/"]
    path = resolve_path(checkpoint, tuple(parts), OTHERWISE)
    source = named(checkpoint, path)
    loaded, files = load_file(path, recipe) if path.is_file() else load_folder(path, recipe)
    agree(loaded.network, recipe, checkpoint)
    source |= loaded.source | {"kind": "file" if path.is_file() else "diffusers", "sha256": sha256(files)}
    vae, vae_source = load_vae(recipe, path, loaded.network)
    return replace(loaded, vae=vae, source=source | vae_source)


def load_pipeline(recipe: Recipe) -> Loaded:
    """Run the recipe's pipeline, whatever the class of its transformer, and take what it shows."""
    from dit_export.checkpoints.pipelines import read_pipeline  # transformers takes a second to import

    assert recipe.pipeline is not None
    for name in ("model", "checkpoint", "synthetic", "conditioning", "vae", "labels", "heads", "prediction"):
        if (value := getattr(recipe, name)) is not None:
            raise UsageError(f"got both a pipeline ({recipe.pipeline}) and {name} {value}: a pipeline has its own")
    path = Path(recipe.pipeline).expanduser()
    refuse_lora(path, path / "transformer")
    read = read_pipeline(path, recipe)
    source = {"path": recipe.pipeline, "kind": "pipeline"} | read.source
    return Loaded(read.network, read.vae, (), read.process, source, examples=read.examples, note=read.note)


def load_file(path: Path, recipe: Recipe) -> tuple[Loaded, list[Path]]:
    """Read a bare file of weights; the VAE and the source are still to be filled in."""
    model = read_file(path, recipe)
    process = read_process(None, learned_variance=model.spec.learned_variance, prediction=recipe.prediction)
    return class_conditional(model, process, recipe), [path]


def load_folder(path: Path, recipe: Recipe) -> tuple[Loaded, list[Path]]:
    """Read a folder that diffusers wrote; the VAE and the source are still to be filled in."""
    folder = transformer_folder(path)
    refuse_lora(path, folder)
    if class_name(folder) not in CLASSES:
        network, files, family, transformer = read_family(folder, recipe)
        tokens = math.prod(side // network.model["patch_size"] for side in network.state.shape[1:])
        if family.shift_tokens is not None:
            tokens = family.shift_tokens(network)
        process = read_process(
            path,
            network.learned_variance,
            recipe.prediction,
            family.scheduler(network.model),
            tokens=tokens,
            spacing=family.flow_spacing,
            mu=family.mu,
        )
        if process.kind != family.process:
            what = f"{path}: its scheduler, or --prediction, describes a {process.kind} process"
            raise UsageError(f"{what}; {family.name} is trained for a {family.process} process")
        process = replace(process, sampler=replace(process.sampler, steps=family.steps(network.model)))
        loaded = Loaded(network, None, read_names(recipe, network), process, {})
        return with_text(loaded, path, family, transformer, recipe), files
    model, files = read_transformer(folder, recipe.resolution)
    process = read_process(path, model.spec.learned_variance, recipe.prediction)
    loaded = class_conditional(model, process, recipe)
    labels = loaded.labels or pipeline_labels(path, model.spec.num_classes)
    return replace(loaded, labels=labels), files


def refuse_lora(*places: Path) -> None:
    for place in places:
        if (place / LORA).exists():
            how = "fuse it (`pipe.fuse_lora()`), save the pipeline and build that; or move the file away"
            raise UsageError(f"{place / LORA}: a LoRA beside the weights, which do not hold it: {how}")


def with_text(loaded: Loaded, path: Path, family: Family, transformer: nn.Module, recipe: Recipe) -> Loaded:
    """Add a pipeline's text encoders, where it has some and the recipe wants them."""
    if family.text is None or recipe.without_text_encoders or not (path / "model_index.json").is_file():
        return loaded
    from dit_export.checkpoints.text import parts, read_text  # transformers takes a second to import

    if not parts(path):
        return loaded
    tokens = recipe.caption_tokens or caption_tokens(path, family)
    text, files = read_text(path, family.text, transformer, tokens)
    return replace(loaded, text=text, source={"text": files})


def class_conditional(model: DiT, process: Process, recipe: Recipe) -> Loaded:
    if process.prediction == "velocity":
        model = keys.without_variance(model)
    network = dit_network(model, process.prediction)
    return Loaded(network, None, read_names(recipe, network), process, {})


def read_names(recipe: Recipe, network: Network) -> tuple[str, ...]:
    """Return the class names of the recipe's file; () where it names none."""
    if not recipe.labels:
        return ()
    path = Path(recipe.labels).expanduser()
    classes = count_classes(network.ports, network.null)
    if not classes:
        raise UsageError(f"{path}: class names, but the network has no labels")
    return read_labels(path, classes)


def load_source(contract: Manifest, folder: Path) -> Loaded:
    """Load the weights that a bundle was built from, and check that they are the same."""
    if not isinstance(contract.source.get("recipe"), dict):
        raise UsageError(f"{folder}: its manifest does not say what it was built from; try `dit-run verify`")
    if contract.source.get("kind") not in KINDS:
        what = f"{folder}: of a program's own network, whose weights no command reads"
        raise UsageError(f"{what}; run `dit-export regress {folder}`")
    recipe = recipe_of(contract, folder)
    loaded = load(recipe, contract.size if recipe.sizes[1:] else None)
    was = {key: value for key, value in contract.source.items() if key != "recipe"}
    if was != loaded.source:
        raise UsageError(f"the weights are not the ones of this bundle: got {loaded.source}, expected {was}")
    return loaded


def recipe_of(contract: Manifest, folder: Path) -> Recipe:
    """Return the recipe that a manifest holds."""
    known = {each.name for each in fields(Recipe)}
    if unknown := sorted(contract.source["recipe"].keys() - known):
        what = f"{folder}: the recipe in its manifest has {unknown[0]!r}, which this version does not know"
        raise UsageError(f"{what}; rebuild it with `dit-export build`")
    return Recipe(**contract.source["recipe"])


def load_synthetic(recipe: Recipe, made_for: Any) -> Loaded:
    """Make random weights for images of the resolution `made_for`, and resize the network to the recipe's."""
    if recipe.checkpoint:
        raise UsageError(f"got both a checkpoint ({recipe.checkpoint}) and --synthetic: pass one of them")
    if recipe.model is None:
        raise UsageError(f"--synthetic needs a model; known: {', '.join(specs.MODELS)}")
    assert recipe.synthetic is not None
    process = read_process(None, prediction=recipe.prediction)
    spec = specs.at_resolution(specs.model(recipe.model), made_for)
    if recipe.conditioning is not None:
        spec = specs.with_conditioning(spec, recipe.conditioning)
    spec = replace(spec, learned_variance=process.prediction != "velocity")
    model = synthetic_dit(spec, recipe.synthetic, process.span)
    model = resized(model, specs.at_resolution(spec, recipe.resolution))
    loaded = class_conditional(model, process, recipe)
    agree(loaded.network, recipe, "--synthetic")
    source: dict[str, Any] = {"kind": "synthetic", "seed": recipe.synthetic}
    if recipe.vae or recipe.latents_only:
        vae, vae_source = load_vae(recipe, None, loaded.network)
        source |= vae_source
    else:
        vae = synthetic_vae(recipe.synthetic)
    return replace(loaded, vae=vae, source=source)


def load_vae(recipe: Recipe, checkpoint: Path | None, network: Network) -> tuple[Any, dict[str, Any]]:
    """Load the recipe's VAE, or the checkpoint's own, and say where it came from."""
    if recipe.latents_only:
        return None, {}
    if recipe.vae:
        path = resolve_path(recipe.vae, ("", "vae/"), "pass --vae PATH, or --latents-only to build no decoder")
        if path.is_file():
            raise UsageError(f"{recipe.vae}: a file, expected a folder with config.json or the id of one on the hub")
        source = named(recipe.vae, path)
    elif checkpoint is not None and (checkpoint / "vae").is_dir():
        path, source = checkpoint / "vae", {}
    else:
        raise UsageError(f"{checkpoint}: holds no VAE: pass --vae PATH or HUB-ID, or --latents-only")
    vae, files = read_vae(path, network.state.shape[0], network.pixels)
    return vae, {"vae": source | {"sha256": sha256(files)}}


def public_checkpoint(recipe: Recipe) -> str:
    if recipe.model is None:
        raise UsageError("nothing to build: pass a model, --checkpoint PATH or HUB-ID, or both")
    resolution = specs.at_resolution(specs.model(recipe.model), recipe.resolution).resolution
    if (recipe.model, resolution) not in PUBLIC or recipe.conditioning not in (None, ModelSpec.conditioning):
        way = f" with {recipe.conditioning}" if recipe.conditioning else ""
        raise UsageError(f"no public weights exist for {recipe.model}{way} at {resolution} px: {OTHERWISE}")
    return PUBLIC[recipe.model, resolution]


def transformer_folder(path: Path) -> Path:
    for folder in (path / "transformer", path):
        if (folder / "config.json").is_file():
            return folder
    raise UsageError(
        f"{path}: holds neither transformer/config.json nor config.json: not a folder that diffusers wrote"
    )


def named(name: str, path: Path) -> dict[str, Any]:
    """Return a checkpoint's origin: its path, or its hub id and the commit, which is its folder's name in the cache."""
    return {"path": name} if Path(name).expanduser() == path else {"hub": name.partition("@")[0], "revision": path.name}


def agree(network: Network, recipe: Recipe, where: str) -> None:
    """Refuse a recipe that says another thing about the network than its weights."""
    if recipe.model is not None:
        specs.model(recipe.model)
    if recipe.caption_tokens is not None and all(port.name != "captions" for port in network.conditions):
        raise UsageError(f"{where}: caption-tokens {recipe.caption_tokens}, but the network has no captions")
    if recipe.frames is not None and "frames" not in network.model:
        raise UsageError(f"{where}: frames {recipe.frames}, but the network draws no videos")
    for key in ("model", "conditioning", "heads"):
        asked, value = getattr(recipe, key), network.model.get("name" if key == "model" else key)
        if asked is not None and asked != value:
            raise UsageError(f"{where}: the weights' {key} is {value}, expected {asked} as the recipe says")
