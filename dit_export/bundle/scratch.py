"""A bundle without a reference and without a proof: to measure, never to ship."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from dit_export.bundle.assemble import Assembly
from dit_export.bundle.inputs import NO_INPUTS, Inputs
from dit_export.bundle.tracing import trace_graphs
from dit_export.checkpoints import Loaded
from dit_export.networks.codec import Decoder
from dit_export.precision.measure import Plan
from dit_export.recipe import Recipe
from dit_runtime import backends
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.progress import Progress


def build_scratch_bundle(
    folder: Path,
    loaded: Loaded,
    decoder: Decoder | None,
    recipe: Recipe,
    progress: Progress,
    traced: Path | None = None,
    inputs: Inputs = NO_INPUTS,
) -> Manifest:
    """Write such a bundle, from graphs that lie in `traced` or are traced now."""
    folder.mkdir()
    plain = traced or folder.with_name(f"{folder.name}.traced")
    if not plain.exists():
        trace_graphs(plain, loaded, decoder, progress)
    backend = backends.choose(recipe.backend, recipe.precision)
    plan = Plan(pictures=1, steps=4, batch=1)
    contract = Assembly(folder, plain, loaded, decoder, recipe, backend, progress, inputs=inputs, plan=plan).run()
    if traced is None:
        shutil.rmtree(plain)
    contract = replace(contract, files=manifest.describe_files(folder))
    manifest.write(folder, contract)
    return contract
