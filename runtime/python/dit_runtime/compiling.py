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
        module = backends.backend(name)
        form = f"{Path(graph.onnx).stem}.{getattr(module, 'FORM', name)}.onnx"
        known = [file for file in (*graph.onnx_files, form, *graph.engines.get(name, ())) if file in contract.files]
        manifest.check_files(folder, contract, known)
        islands = tuple(contract.built_with.get("islands", {}).get(graph_name, ()))
        settings = replace(options, precision=graph.precision, form=form if form in known else None, islands=islands)
        made, built = module.compile(folder, graph, settings, progress)
        if made:
            engines[name] = {**engines.get(name, {}), graph_name: built}
        graphs[graph_name] = replace(
            graph, backend=name, engines={**graph.engines, name: made} if made else graph.engines
        )
        files |= {file: manifest.describe(manifest.inside(folder, file)) for file in made}
    built_with = {**contract.built_with, **({"engines": engines} if engines else {})}
    return replace(contract, graphs=graphs, files=files, built_with=built_with)
