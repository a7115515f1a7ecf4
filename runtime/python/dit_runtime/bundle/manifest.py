"""The bundle's contract: manifest.json, what it may say, and the checks before anything it names is opened."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from dit_runtime.errors import BundleError
from dit_runtime.sampling.schedule import Diffusion

FORMAT = 1
NAME = "manifest.json"
ENGINE = ".engine"  # what a file that a backend has compiled ends in
GRAPHS = ("conditioner", "context", "denoiser", "update", "decoder")
DTYPES = ("float32", "int64")
BUILT = {"version": str, "cuda": int, "compute_capabilities": list, "tuning": dict}  # of an engine


@dataclass(frozen=True)
class Port:
    """One input of a network."""

    name: str
    role: str  # "state" | "time" | "condition"
    dtype: str  # "float32" | "int64"
    shape: tuple[int, ...]  # of one row
    size: int = 0  # int64 only: values are 0 … size - 1
    masks: str = ""  # name of the condition port whose tokens (axis 0 of a row) this port marks with 1 or 0


@dataclass(frozen=True)
class TensorSpec:
    """One input or output; a string in the shape is a free dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One network of the bundle: its portable ONNX form, and the files that each backend opens instead of it."""

    onnx: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int = 8  # rows it takes at a time
    precision: str = "fp32"
    backend: str = "onnxruntime"
    engines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by backend

    @property
    def onnx_files(self) -> tuple[str, ...]:
        return (self.onnx, self.onnx + ".data")

    @property
    def files(self) -> tuple[str, ...]:
        return self.engines.get(self.backend, self.onnx_files)


@dataclass(frozen=True)
class File:
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    model: Mapping[str, Any]  # the toolchain's ModelSpec, for people and for inspect
    latent_shape: tuple[int, ...]  # (C, H, W)
    latent_scale: float | None
    num_classes: int  # where there are captions: the examples that verification has instead
    labels: tuple[str, ...]  # names by class; empty where none are known
    guided_channels: int
    unguided_up_to_one: bool
    diffusion: Diffusion
    graphs: Mapping[str, Graph]
    files: Mapping[str, File] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    built_with: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def null_label(self) -> int:
        return self.num_classes

    @property
    def caption_shape(self) -> tuple[int, int] | None:
        """(L, C) of the captions that a bundle takes instead of labels."""
        if "context" not in self.graphs:
            return None
        _, tokens, channels = self.graphs["context"].inputs[0].shape
        return int(tokens), int(channels)

    def to_json(self) -> str:
        table = asdict(self) | {"diffusion": self.diffusion.to_dict()}
        return json.dumps({"format": table.pop("format"), **table}, indent=1, ensure_ascii=False) + "\n"


def read(folder: Path, engines: bool = True) -> Manifest:
    """Parses and checks the manifest, and that each file it names is there in its size; opens none of them.

    Without `engines`, those may be missing or damaged: they are to be made again, or given up (`lost_engines`).
    """
    path = folder / NAME
    if not path.is_file() or path.is_symlink():
        raise BundleError(f"{folder}: no {NAME} here; expected a bundle, as `dit-export build` writes it")
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))  # with a byte order mark or without
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not JSON: {error}") from None
    if not isinstance(table, dict) or not isinstance(table.get("format"), int):
        raise BundleError(f"{path}: no format number; expected {FORMAT}")
    if table["format"] != FORMAT:
        advice = "upgrade dit-export" if table["format"] > FORMAT else "rebuild it with `dit-export build`"
        raise BundleError(f"{path}: format {table['format']}, expected {FORMAT}: {advice}")
    try:
        manifest = _parse(table)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path}: malformed: {type(error).__name__}: {error}") from None
    for name in manifest.files:
        inside(folder, name)
    _require(folder, manifest, [name for name in manifest.files if engines or not name.endswith(ENGINE)])
    return manifest


def _require(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    for name in names:
        location, size = inside(folder, name), manifest.files[name].size
        if not location.is_file():
            raise BundleError(f"{folder}: {name} is missing; rebuild the bundle")
        if location.stat().st_size != size:
            raise BundleError(f"{folder}: {name} has {location.stat().st_size} bytes, expected {size}; rebuild it")


def lost_engines(folder: Path, manifest: Manifest) -> set[str]:
    """Those that are missing, or not of their size."""
    engines = {name: inside(folder, name) for name in manifest.files if name.endswith(ENGINE)}
    return {
        name for name, path in engines.items() if not path.is_file() or path.stat().st_size != manifest.files[name].size
    }


def _parse(table: dict[str, Any]) -> Manifest:
    known = {f.name for f in fields(Manifest)}
    if unknown := sorted(set(table) - known):
        raise ValueError(f"unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    for key in ("model", "source", "built_with", "parity"):
        if not isinstance(table.get(key, {}), dict):
            raise ValueError(f"{key} is {table[key]!r}, expected a table")
    graphs = {name: _graph(graph) for name, graph in table["graphs"].items()}
    if not {"conditioner", "denoiser"} <= set(graphs) <= set(GRAPHS):
        raise ValueError(f"graphs {', '.join(graphs)}; expected {', '.join(GRAPHS)} (conditioner and denoiser always)")
    manifest = Manifest(
        **table
        | {
            "latent_shape": tuple(int(size) for size in table["latent_shape"]),
            "labels": tuple(str(name) for name in table["labels"]),
            "diffusion": Diffusion.from_dict(table["diffusion"]),
            "graphs": graphs,
            "files": {name: File(int(file["size"]), str(file["sha256"])) for name, file in table["files"].items()},
        }
    )
    for graph in graphs.values():
        for name in dict.fromkeys((*graph.files, *(name for files in graph.engines.values() for name in files))):
            if name not in manifest.files:
                raise ValueError(f"{name} has no size and sha256 under files")
    if manifest.labels and len(manifest.labels) != manifest.num_classes:
        raise ValueError(f"{len(manifest.labels)} label names, expected {manifest.num_classes}")
    if len(manifest.latent_shape) != 3 or min(manifest.latent_shape) < 1:
        raise ValueError(f"latent_shape {list(manifest.latent_shape)}, expected [channels, height, width]")
    rows = [(graphs["denoiser"].inputs, "denoiser", 3), (graphs["conditioner"].outputs, "conditioner", 2)]
    if "context" in graphs:
        rows += [(graphs["context"].inputs, "context", 2), (graphs["context"].outputs, "context", 2)]
    for specs, name, axes in rows:
        fixed = specs[0].shape[1:] if specs else ()
        if len(fixed) != axes or not all(isinstance(size, int) for size in fixed):
            raise ValueError(f"{name} has the shape {list(fixed)} a row, expected {axes} numbers")
        if name == "denoiser" and fixed != manifest.latent_shape:
            raise ValueError(f"latent_shape is {list(manifest.latent_shape)}, expected the denoiser's {list(fixed)}")
    if manifest.num_classes < 1 or any(graph.max_batch < 1 for graph in graphs.values()):
        raise ValueError("num_classes or max_batch is below 1")
    return manifest


def _graph(table: dict[str, Any]) -> Graph:
    def tensors(key: str) -> tuple[TensorSpec, ...]:
        specs = tuple(TensorSpec(**tensor | {"shape": tuple(tensor["shape"])}) for tensor in table[key])
        for spec in specs:
            if spec.dtype not in DTYPES:
                raise ValueError(f"{spec.name} has dtype {spec.dtype}; known: {', '.join(DTYPES)}")
        return specs

    engines = {str(backend): tuple(str(name) for name in files) for backend, files in table["engines"].items()}
    if not all(engines.values()):
        raise ValueError("an engine without files")
    graph = Graph(**table | {"inputs": tensors("inputs"), "outputs": tensors("outputs"), "engines": engines})
    for key, kind in (("onnx", str), ("max_batch", int), ("precision", str), ("backend", str)):
        if type(getattr(graph, key)) is not kind:
            raise ValueError(f"{key} is {getattr(graph, key)!r}, expected {kind.__name__}")
    return graph


def built(manifest: Manifest, graph: str) -> Mapping[str, Any]:
    """With what and for what a graph's engine was built; empty where the backend opens the ONNX form."""
    table: Any = manifest.built_with
    for key in ("engines", manifest.graphs[graph].backend, graph):
        table = table.get(key, {}) if isinstance(table, Mapping) else None
    if not isinstance(table, Mapping) or any(type(table[key]) is not BUILT[key] for key in table.keys() & BUILT):
        raise BundleError(f"{NAME}: built_with says {table!r} of {graph}'s engine; expected {', '.join(BUILT)}")
    return table


def inside(folder: Path, name: str) -> Path:
    """The file `name` of the bundle; nothing may lead out of the folder."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in name or ":" in name:
        raise BundleError(f"{folder}: file name {name!r} leaves the bundle; refused")
    path = folder
    for part in pure.parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{folder}: {name!r} is a link; refused")
    return path


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compares sha256 sums, of large files at the same time; engines are executable, so nothing is opened before."""
    from concurrent.futures import ThreadPoolExecutor  # here, so that importing the runtime stays quick

    names = list(names)
    if unknown := [name for name in names if name not in manifest.files]:
        raise BundleError(f"{folder}: {unknown[0]} is not in the manifest")
    _require(folder, manifest, names)
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(sha256, [inside(folder, name) for name in names]))
    for name, found in zip(names, sums, strict=True):
        if found != manifest.files[name].sha256:
            raise BundleError(f"{folder}: {name} does not have the sha256 of its manifest; it is damaged: rebuild it")


def sha256(path: Path) -> str:
    import hashlib  # here, so that importing the runtime stays quick

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path, skip: Collection[str] = ()) -> dict[str, File]:
    """Size and sha256 of everything in the folder but the manifest and what is skipped."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: describe(path) for name, path in files.items() if name != NAME and name not in skip}


def describe(path: Path) -> File:
    return File(path.stat().st_size, sha256(path))


def write(folder: Path, manifest: Manifest) -> None:
    """Replaces the manifest in one step."""
    write_file(folder, NAME, manifest.to_json().encode())


def write_file(folder: Path, name: str, content: bytes) -> None:
    """Puts a file into the bundle in one step, and follows no link that somebody left there."""
    partial = folder / f"{name}.partial"
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:
            file.write(content)
        partial.replace(folder / name)
    except BaseException:  # a full disk, or ctrl-c
        partial.unlink(missing_ok=True)
        raise
