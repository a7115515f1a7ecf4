"""Write the graph of a stage: its portable form, and one for each backend or provider that has passes of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_graphsurgeon as gs

from dit_export.bundle.describe import Written, describe
from dit_export.checkpoints import Loaded
from dit_export.graph import onnxfile
from dit_export.recipe import Recipe
from dit_runtime import backends
from dit_runtime.backends import PORTABLE_BACKEND, PROVIDER_FORMS
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import File

Lowerings = Mapping[str, Sequence[Callable[[gs.Graph], int]]]  # the passes by form


def save(graph: gs.Graph, folder: Path, name: str) -> None:
    """Write a graph in its present form; it is two files, with weights or without."""
    files = onnxfile.save(graph, folder / f"{name}.onnx")
    if len(files) == 1:
        (folder / onnxfile.data_name(files[0])).touch()


def save_lowered(
    graph: gs.Graph, folder: Path, name: str, precision: str, half: str | None, lowerings: Lowerings
) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """Write the forms that differ from the graph; return their files, and how often each pass fired."""
    files: dict[str, tuple[str, ...]] = {}
    counts: dict[str, int] = {}
    for form, passes in lowerings.items():
        backend, provider = PROVIDER_FORMS.get(form, (form, None))
        able = precision in backends.backend(backend).PRECISIONS and not backends.refusal(backend, precision, provider)
        if able and backends.typed(backend, precision) == half:
            lowered = graph.copy()
            fired = {rewrite.__name__: rewrite(lowered) for rewrite in passes}
            counts |= fired
            if any(fired.values()):
                files[form] = onnxfile.save(lowered, folder / f"{name}.{form}.onnx")
    return files, counts


def write_fp32(
    folder: Path, loaded: Loaded, graphs: Mapping[str, gs.Graph], runs: Mapping[str, str], max_batch: int
) -> None:
    """Write the fused graphs and a manifest without checksums, which nothing but the measuring run reads."""
    for name, graph in graphs.items():
        save(graph, folder, name)
    written = {name: Written("fp32") for name in graphs}
    recipe = Recipe(backend=PORTABLE_BACKEND, max_batch=max_batch)
    contract = describe(loaded, recipe, PORTABLE_BACKEND, graphs, runs, written)
    files = [file for stage in contract.stages for file in stage.onnx_files]
    sizes = {file: File((folder / file).stat().st_size, "") for file in files}
    manifest.write(folder, replace(contract, files=sizes))
