"""Describe in a manifest what was written, and with which tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import onnx_graphsurgeon as gs

from dit_export.checkpoints import Loaded
from dit_export.graph import onnxfile
from dit_export.recipe import Recipe
from dit_runtime import backends
from dit_runtime.bundle.manifest import Guidance, Manifest, Stage, TensorSpec
from dit_runtime.bundle.records import size_name
from dit_runtime.facts import VERSION

# Rows a call. XL/2 has 31 MB a caption and 0.8 MB a (timestep, label); the VAE's activations for 512 px are hundreds of
# MB, and a batch gains it nothing on a CPU. Videos are decoded alone: each has those of all its frames, and a CPU's
# convolutions in three dimensions round otherwise in a batch.
ROWS = {"prompt": 8, "condition": 8, "time": 64, "time+condition": 64, "start": 1, "end": 2}
TOOLS = ("torch", "onnx", "onnxscript", "onnx-graphsurgeon", "diffusers", "numpy")


class Written(NamedTuple):
    """One stage in its files."""

    precision: str
    engines: Mapping[str, tuple[str, ...]] = {}  # by backend: the files of its own form
    counts: Mapping[str, int] = {}  # how often each pass fired
    fp32_products: tuple[str, ...] = ()  # of a half-precision graph
    overflows: Mapping[str, float] = {}  # tensors that half precision cannot store, with their largest magnitude


def describe(
    loaded: Loaded,
    recipe: Recipe,
    backend: str,
    graphs: Mapping[str, gs.Graph],
    runs: Mapping[str, str],
    written: Mapping[str, Written],
) -> Manifest:
    """Return the manifest of these stages; its files are still to be named."""
    network = loaded.network
    stages = []
    for name, graph in graphs.items():
        reads, gives = onnxfile.signature(graph)
        stages.append(
            Stage(
                name=name,
                runs=runs[name],
                reads=reads,
                gives=gives,
                onnx=f"{name}.onnx",
                max_batch=1 if _gives_videos(gives) else ROWS.get(runs[name], recipe.max_batch),
                precision=written[name].precision,
                backend=backends.choose(backends.place(runs[name], backend), written[name].precision),
                engines=written[name].engines,
            )
        )
    islands = {name: list(stage.fp32_products) for name, stage in written.items() if stage.fp32_products}
    overflows = {name: dict(stage.overflows) for name, stage in written.items() if stage.overflows}
    built_with: dict[str, Any] = {
        "passes": {name: dict(stage.counts) for name, stage in written.items()},
        "versions": _versions(),
        "islands": islands,
    }
    return Manifest(
        model=network.model,
        size=size_name(network.model.get("resolution", "")),
        ports=network.ports,
        null=network.null,
        labels=loaded.labels,
        guidance=Guidance(
            channels=network.guided_channels or network.state.shape[0],
            unguided_up_to_one=network.unguided_up_to_one,
            default=network.guidance,
            port=network.guidance_port,
        ),
        process=loaded.process,
        stages=tuple(stages),
        prompts=loaded.text.prompts if loaded.text is not None and "prompt" in runs.values() else (),
        source={**loaded.source, "recipe": asdict(replace(recipe, timing_cache=None))},  # a file of this machine alone
        built_with=built_with | ({"wide": overflows} if overflows else {}),
    )


def _gives_videos(gives: Sequence[TensorSpec]) -> bool:
    return any(spec.name == "images" and len(spec.shape) == 5 for spec in gives)


def _versions() -> dict[str, str]:
    versions = {"dit-export": VERSION}
    versions |= {name: here for name, here in backends.versions().items() if here is not None}
    for name in TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
