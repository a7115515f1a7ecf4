"""A bundle's graphs to engines of one backend: on the target by `dit-run compile`, anywhere by `dit-export build`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dit_runtime import backends, manifest
from dit_runtime.backends import Options
from dit_runtime.manifest import Manifest
from dit_runtime.progress import Progress


def compile_graphs(folder: Path, contract: Manifest, backend: str, options: Options, progress: Progress) -> Manifest:
    """The contract with this backend for every graph, and with the engines that it made; writes no manifest."""
    graphs, files = {}, dict(contract.files)
    engines = dict(contract.built_with.get("engines", {}))
    for graph_name, graph in contract.graphs.items():
        name = backends.choose(backend, graph.precision)
        manifest.check_files(folder, contract, sorted({*graph.onnx_files, *graph.engines.get(name, ())}))
        islands = tuple(contract.built_with.get("islands", {}).get(graph_name, ()))
        settings = replace(options, precision=graph.precision, islands=islands)
        made, built = backends.backend(name).compile(folder, graph, settings, progress)
        if made:
            engines[name] = {**engines.get(name, {}), graph_name: built}
        graphs[graph_name] = replace(
            graph, backend=name, engines={**graph.engines, name: made} if made else graph.engines
        )
        files |= {file: manifest.describe(manifest.inside(folder, file)) for file in made}
    built_with = {**contract.built_with, **({"engines": engines} if engines else {})}
    return replace(contract, graphs=graphs, files=files, built_with=built_with)


def obstacle(contract: Manifest) -> str | None:
    """Why these engines cannot run here; None where they can."""
    reasons = (
        backends.backend(graph.backend).obstacle(manifest.built(contract, name))
        for name, graph in contract.graphs.items()
    )
    return next(filter(None, reasons), None)


def targets(contract: Manifest) -> str:
    """What its engines were compiled for, for people."""
    built = manifest.built(contract, "denoiser")
    return f"NVIDIA GPUs of compute capability {', '.join(built['compute_capabilities'])}"
