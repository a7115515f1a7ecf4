"""Checkpoints in, one network out: the reader is chosen by what the checkpoint is, never by a model's name."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from dit_export import spec as specs
from dit_export.checkpoints import keys
from dit_export.checkpoints.diffusers import read_diffusion, read_transformer
from dit_export.checkpoints.files import sha256
from dit_export.checkpoints.hub import locate
from dit_export.checkpoints.labels import pipeline_labels, read_labels
from dit_export.checkpoints.meta import read_file
from dit_export.checkpoints.scheduler import read_scheduler_config
from dit_export.checkpoints.synthetic import synthetic_dit, synthetic_vae
from dit_export.checkpoints.vae import read_vae
from dit_export.networks.dit import DiT
from dit_export.spec import ModelSpec, Recipe
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.errors import UsageError
from dit_runtime.sampling.schedule import Diffusion

OTHERWISE = (
    "pass --checkpoint PATH (make: CHECKPOINT=PATH), or --synthetic (make: SYNTHETIC=1) to build with made-up weights"
)
PUBLIC: dict[tuple[str, int | str], str] = {  # model, resolution -> the hub's checkpoint
    ("XL/2", 256): "facebook/DiT-XL-2-256",
    ("XL/2", 512): "facebook/DiT-XL-2-512",
}


@dataclass(frozen=True)
class Loaded:
    """What a build starts from."""

    spec: ModelSpec
    model: DiT  # eval, float32, no gradients
    vae: AutoencoderKL | None
    labels: tuple[str, ...]  # by id; () where unknown
    diffusion: Diffusion
    source: dict[str, Any]  # provenance, JSON-able


def load(recipe: Recipe) -> Loaded:
    """Weights from the recipe's checkpoint, from the public one of its model, or made up when it says so."""
    if recipe.latents_only and recipe.vae:
        raise UsageError(f"got both a VAE ({recipe.vae}) and --latents-only: pass one of them")
    if recipe.synthetic is not None:
        return load_synthetic(recipe)
    checkpoint = recipe.checkpoint or public_checkpoint(recipe)
    parts = ("", "transformer/") if recipe.latents_only or recipe.vae else ("", "transformer/", "vae/")
    path = locate(checkpoint, parts, OTHERWISE)
    source = named(checkpoint, path)
    if path.is_file():
        model, files = read_file(path, recipe), [path]
        labels: tuple[str, ...] = ()
        diffusion = read_scheduler_config(
            None, learned_variance=model.spec.learned_variance, prediction=recipe.prediction
        )
    else:
        model, files = read_transformer(transformer_folder(path), recipe.resolution)
        labels = () if recipe.labels or model.spec.by.captioned else pipeline_labels(path, model.spec.num_classes)
        diffusion = read_diffusion(path, model.spec.learned_variance, recipe.prediction)
    if diffusion.prediction == "velocity":
        model = keys.without_variance(model)
    agree(model.spec, recipe, checkpoint)
    source |= {"kind": "file" if path.is_file() else "diffusers", "sha256": sha256(files)}
    vae, vae_source = load_vae(recipe, path, model.spec)
    if recipe.labels:
        labels = read_labels(Path(recipe.labels).expanduser(), model.spec.num_classes)
    return Loaded(model.spec, model, vae, labels, diffusion, source | vae_source)


def load_source(contract: Manifest, folder: Path) -> Loaded:
    """The weights that a bundle was built from, found again and known to be the same."""
    if not isinstance(contract.source.get("recipe"), dict):
        raise UsageError(f"{folder}: its manifest does not say what it was built from; try `dit-run verify`")
    known = {field.name for field in fields(Recipe)}
    if unknown := sorted(contract.source["recipe"].keys() - known):
        what = f"{folder}: the recipe in its manifest has {unknown[0]!r}, which this version does not know"
        raise UsageError(f"{what}; rebuild it with `dit-export build`")
    loaded = load(Recipe(**contract.source["recipe"]))
    was = {key: value for key, value in contract.source.items() if key != "recipe"}
    if was != loaded.source:
        raise UsageError(f"the weights are not the ones of this bundle: got {loaded.source}, expected {was}")
    return loaded


def load_synthetic(recipe: Recipe) -> Loaded:
    if recipe.checkpoint:
        raise UsageError(f"got both a checkpoint ({recipe.checkpoint}) and --synthetic: pass one of them")
    if recipe.model is None:
        raise UsageError(f"--synthetic needs a model; known: {', '.join(specs.MODELS)}")
    assert recipe.synthetic is not None
    diffusion = read_scheduler_config(None, prediction=recipe.prediction)
    spec = specs.sized(specs.model(recipe.model), recipe.resolution)
    if recipe.conditioning is not None:
        spec = specs.conditioned(spec, recipe.conditioning)
    spec = replace(spec, learned_variance=diffusion.prediction != "velocity")
    agree(spec, recipe, "--synthetic")
    labels = read_labels(Path(recipe.labels).expanduser(), spec.num_classes) if recipe.labels else ()
    source: dict[str, Any] = {"kind": "synthetic", "seed": recipe.synthetic}
    if recipe.vae or recipe.latents_only:
        vae, vae_source = load_vae(recipe, None, spec)
        source |= vae_source
    else:
        vae = synthetic_vae(recipe.synthetic)
    model = synthetic_dit(spec, recipe.synthetic, diffusion.span)
    return Loaded(spec, model, vae, labels, diffusion, source)


def load_vae(recipe: Recipe, checkpoint: Path | None, spec: ModelSpec) -> tuple[AutoencoderKL | None, dict[str, Any]]:
    """The VAE that was asked for, or the checkpoint's own, and where it came from."""
    if recipe.latents_only:
        return None, {}
    if recipe.vae:
        path = locate(recipe.vae, ("", "vae/"), "pass --vae PATH, or --latents-only to build no decoder")
        if path.is_file():
            raise UsageError(f"{recipe.vae}: a file, expected a folder with config.json or the id of one on the hub")
        source = named(recipe.vae, path)
    elif checkpoint is not None and (checkpoint / "vae").is_dir():
        path, source = checkpoint / "vae", {}
    else:
        raise UsageError(f"{checkpoint}: holds no VAE: pass --vae PATH or HUB-ID, or --latents-only")
    vae, files = read_vae(path, spec.channels)
    return vae, {"vae": source | {"sha256": sha256(files)}}


def public_checkpoint(recipe: Recipe) -> str:
    if recipe.model is None:
        raise UsageError("nothing to build: pass a model, --checkpoint PATH or HUB-ID, or both")
    resolution = specs.sized(specs.model(recipe.model), recipe.resolution).resolution
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
    """A path of the user's, or a hub id with its revision: the cache names a snapshot's folder by its commit."""
    return {"path": name} if Path(name).expanduser() == path else {"hub": name, "revision": path.name}


def agree(spec: ModelSpec, recipe: Recipe, where: str) -> None:
    """What the recipe says about the network must be what the checkpoint is."""
    got: dict[str, Any] = {
        "model": specs.table_name(spec),
        "conditioning": spec.conditioning,
        "heads": spec.heads,
    }
    if recipe.model is not None:
        specs.model(recipe.model)
    for field, value in got.items():
        asked = getattr(recipe, field)
        if asked is not None and asked != value:
            raise UsageError(f"{where}: the weights' {field} is {value}, expected {asked} as the recipe says")
