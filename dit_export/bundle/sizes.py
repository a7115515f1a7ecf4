"""Join bundles of one network at several sizes: tensors of the same content stand once on the disk."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import uses_external_data

from dit_export.checkpoints import Loaded, load
from dit_export.graph.onnxfile import ALIGNMENT, data_name
from dit_export.recipe import Recipe
from dit_export.verify import report
from dit_export.verify.check import Built
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest, Stage
from dit_runtime.bundle.records import Size
from dit_runtime.errors import UsageError

DATA = ".data"
PER_STAGE = ("passes", "islands", "wide")  # tables of `built_with` by stage; `engines` is one by backend and stage


class Place(NamedTuple):
    """Locate the bytes of a tensor."""

    file: str
    offset: int
    length: int


def load_again(recipe: Recipe, size: int | str | None, first: Loaded) -> Loaded:
    """Load the network for another size; its text encoders are there already."""
    loaded = load(replace(recipe, without_text_encoders=True), size)
    source = {key: value for key, value in first.source.items() if key != "text"}
    if loaded.source != source:
        raise UsageError(f"size {size}: the weights are {loaded.source}, expected {source} as of the first size")
    return replace(loaded, source=first.source)


def join(folder: Path, contract: Manifest, other_folder: Path, other: Manifest) -> Manifest:
    """Move a bundle of another size into a bundle; return the manifest of both.

    A stage with the same graphs as in the first size is stored once; any other has the size at the end of its name.
    """
    for key in ("null", "labels", "guidance"):
        if getattr(other, key) != getattr(contract, key):
            raise UsageError(f"size {other.size}: {key} is {getattr(other, key)}, expected {getattr(contract, key)}")
    suffix = f"-{other.size}"
    stages, moved = [stage for stage in contract.stages if stage.runs == "prompt"], dict[str, str]()
    for stage in other.stages:
        known = [own for size in contract.each_size for own in size.stages if _base(own, size) == stage.name]
        models = {name: onnx.load(other_folder / name, load_external_data=False) for name in _graphs(stage)}
        data = data_name(f"{stage.name}{suffix}.onnx")
        _share(folder, known, other_folder, models, data)
        if stage in contract.stages and all(models[name] == _load(folder, name) for name in models):
            stages.append(stage)
            continue
        moved[stage.name] = f"{stage.name}{suffix}"
        (folder / data).touch()
        stages.append(_move(folder, other_folder, stage, moved[stage.name], models))
    size = Size(**{key.name: getattr(other, key.name) for key in fields(Size)})
    size = replace(size, suffix=suffix, stages=tuple(stages), built_with=_renamed(other.built_with, moved))
    _move_rest(folder, other_folder, other, suffix)
    return replace(contract, sizes=(*contract.sizes, size))


def together(sizes: Mapping[str, Built]) -> Built:
    """Return the first size's outcome with the figures of all sizes; another size's name precedes its stages' names."""
    (_, first), *others = sizes.items()
    figures = [
        [
            *getattr(first, key),
            *(replace(row, stage=f"{name}: {row.stage}") for name, own in others for row in getattr(own, key)),
        ]
        for key in ("proof", "checks")
    ]
    return replace(first, proof=figures[0], checks=figures[1])


def _base(stage: Stage, size: Manifest) -> str:
    return stage.name.removesuffix(size.suffix)


def _graphs(stage: Stage) -> list[str]:
    files = (stage.onnx, *(file for own in stage.engines.values() for file in own))
    return [file for file in dict.fromkeys(files) if file.endswith(".onnx")]


def _load(folder: Path, name: str) -> ModelProto | None:
    path = folder / name
    return onnx.load(path, load_external_data=False) if path.is_file() else None


def _share(folder: Path, known: Iterable[Stage], source: Path, models: Mapping[str, ModelProto], data: str) -> None:
    """Point the graphs to equal tensors of the known stages; append all other tensors to the file `data`."""
    here = [_load(folder, name) for stage in known for name in _graphs(stage)]
    stored = {place for model in here if model is not None for _, place in _external(model)}
    places = {_sum(folder, place): place for place in sorted(stored)}  # by the content's sum
    sums: dict[Place, str] = {}  # the forms of a stage have most tensors in common
    for model in models.values():
        for tensor, place in _external(model):
            if place not in sums:
                sums[place] = _sum(source, place)
                if sums[place] not in places:
                    places[sums[place]] = _append(folder / data, _bytes(source, place))
            for entry in tensor.external_data:
                new = places[sums[place]]
                entry.value = {"location": new.file, "offset": str(new.offset)}.get(entry.key, entry.value)


def _external(model: ModelProto) -> Iterator[tuple[TensorProto, Place]]:
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            where = {entry.key: entry.value for entry in tensor.external_data}
            yield tensor, Place(where["location"], int(where["offset"]), int(where["length"]))


def _bytes(folder: Path, place: Place) -> NDArray[np.uint8]:
    return np.memmap(folder / place.file, np.uint8, "r", place.offset, (place.length,))


def _sum(folder: Path, place: Place) -> str:
    return hashlib.sha256(_bytes(folder, place).data).hexdigest()


def _append(path: Path, content: NDArray[np.uint8]) -> Place:
    with path.open("ab") as file:
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        place = Place(path.name, file.tell(), content.nbytes)
        content.tofile(file)
    return place


def _move(folder: Path, source: Path, stage: Stage, name: str, models: Mapping[str, ModelProto]) -> Stage:
    """Write a stage's graphs and move its engines, all under another name."""
    renamed = {file: f"{name}{file.removeprefix(stage.name)}" for own in stage.engines.values() for file in own}
    renamed[stage.onnx] = f"{name}.onnx"
    data = {file: [*dict.fromkeys(place.file for _, place in _external(model))] for file, model in models.items()}
    for file, model in models.items():
        onnx.save(model, folder / renamed[file])
    engines = {}
    for backend, own in stage.engines.items():
        for file in own:
            if file not in models and not file.endswith(DATA):
                shutil.move(source / file, folder / renamed[file])
        weights = [file for graph in own if graph in models for file in data[graph]]
        files = [renamed[file] for file in own if not file.endswith(DATA)]
        engines[backend] = tuple(dict.fromkeys((*files, *weights)))
    shared = tuple(file for file in data[stage.onnx] if file != data_name(f"{name}.onnx"))
    return replace(stage, name=name, onnx=renamed[stage.onnx], shared=shared, engines=engines)


def _renamed(built_with: Mapping[str, Any], moved: Mapping[str, str]) -> dict[str, Any]:
    """Return the tables of a manifest's `built_with` with the stages' new names."""

    def by_stage(table: Mapping[str, Any]) -> dict[str, Any]:
        return {moved.get(name, name): value for name, value in table.items()}

    tables = {key: by_stage(built_with[key]) for key in PER_STAGE if key in built_with}
    if "engines" in built_with:
        tables["engines"] = {backend: by_stage(table) for backend, table in built_with["engines"].items()}
    return {**built_with, **tables}


def _move_rest(folder: Path, source: Path, other: Manifest, suffix: str) -> None:
    """Move what no stage opens, such as the reference, each under the name that it has at this size."""
    opened = {file for stage in other.stages for file in (*stage.onnx_files, *_graphs(stage))}
    opened |= {file for stage in other.stages for own in stage.engines.values() for file in own}
    sized = replace(other, suffix=suffix)
    for path in source.iterdir():
        if path.name not in (*opened, manifest.NAME, report.NAME):
            shutil.move(path, folder / sized.own(path.name))
