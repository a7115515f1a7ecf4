"""A bundle's graphs to engines of one backend: on the target by `dit-run compile`, anywhere by `dit-export build`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from dit_runtime import backends
from dit_runtime.backends import Options
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.progress import Progress


def compile_graphs(folder: Path, contract: Manifest, backend: str, options: Options, progress: Progress) -> Manifest:
    """The contract with this backend for every graph, and with the engines that it made; writes no manifest.

    What the new engines replace is named no more, and still there; engines that are missing or cut short, of whichever
    backend, are not named either. Nothing was verified yet.
    """
    names = {graph: backends.choose(backend, contract.graphs[graph].precision) for graph in contract.graphs}
    for graph_name, name in names.items():
        backends.require(name, contract.graphs[graph_name].precision, options.tuning)
    lost = manifest.lost_engines(folder, contract)  # another backend's are given up: to be copied or made again
    graphs, files = {}, {name: file for name, file in contract.files.items() if name not in lost}
    engines = dict(contract.built_with.get("engines", {}))
    with ExitStack() as undo:
        for graph_name, graph in contract.graphs.items():
            name = names[graph_name]
            manifest.check_files(folder, contract, graph.onnx_files)
            islands = tuple(contract.built_with.get("islands", {}).get(graph_name, ()))
            settings = replace(options, precision=graph.precision, islands=islands)
            made, built = backends.backend(name).compile(folder, graph, settings, progress)
            kept = {other: own for other, own in graph.engines.items() if lost.isdisjoint(own)}
            for other in graph.engines.keys() - kept.keys():
                engines[other] = {one: how for one, how in engines.get(other, {}).items() if one != graph_name}
            if made:
                for file in graph.engines.get(name, ()):
                    if file.endswith(manifest.ENGINE):
                        files.pop(file, None)
                engines[name] = {**engines.get(name, {}), graph_name: built}
                kept[name] = made
            else:
                manifest.check_files(folder, contract, graph.engines.get(name, ()))
            graphs[graph_name] = replace(graph, backend=name, engines=kept)
            undo.callback(remove, folder, {*made} - {*contract.files})
            files |= {file: manifest.describe(manifest.inside(folder, file)) for file in made}
        undo.pop_all()
    built_with = {**contract.built_with, **({"engines": engines} if engines else {})}
    proof = {key: contract.parity[key] for key in ("proof",) if key in contract.parity}  # which is of the weights
    return replace(contract, graphs=graphs, files=files, built_with=built_with, parity=proof)


def remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        manifest.inside(folder, name).unlink(missing_ok=True)


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
