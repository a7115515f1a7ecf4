"""A recipe to a verified bundle: trace, fuse, write, verify, and only then put in place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

import dit_runtime.verify
from dit_export import graphs, trace
from dit_export.fuse import LOWERINGS, expected_counts, fuse, narrow, require
from dit_export.fuse.subpixel import subpixel
from dit_export.spec import PRECISIONS, ModelSpec, Recipe, signatures, table_name
from dit_export.verify.parity import graph_parity, proof
from dit_export.verify.reference import make_reference, save_reference
from dit_export.verify.twin import twins
from dit_export.weights import Loaded, load
from dit_runtime import backends, manifest
from dit_runtime.errors import UsageError
from dit_runtime.manifest import Graph, Manifest
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.verify import Check

PARITY = "parity.json"
_PACKAGES = ("dit-export", "torch", "onnx", "onnxscript", "onnx-graphsurgeon", "diffusers", "numpy", *backends.BACKENDS)
CONDITIONER_ROWS = 64  # (t, label) pairs a call: of XL/2's 783 kB a pair 50 MB
DECODER_ROWS = 2  # a 512 px picture's activations are hundreds of MB, and a batch gains nothing on a CPU


@dataclass(frozen=True)
class Built:
    folder: Path
    checks: list[Check]
    sensitive: bool

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def default_folder(spec: ModelSpec, recipe: Recipe, backend: str) -> Path:
    size = table_name(spec).replace("/", "-").lower()
    return Path("engines/build") / f"dit-{size}-{spec.resolution}-{recipe.precision}-{backend}"


def build(recipe: Recipe, progress: Progress) -> Built:
    if recipe.precision not in PRECISIONS:
        raise UsageError(f"precision {recipe.precision!r} is not known; known: {', '.join(PRECISIONS)}")
    if recipe.max_batch < 1:
        raise UsageError(f"max-batch {recipe.max_batch}; expected at least 1")
    if recipe.resolution is not None and (recipe.resolution < 8 or recipe.resolution % 8):
        raise UsageError(f"resolution {recipe.resolution}; expected a multiple of 8, such as 256 or 512")
    if recipe.output:
        _refuse_foreign(Path(recipe.output))  # before the long work
    backend = backends.choose(recipe.backend, recipe.precision)
    with progress.stage("weights"):
        loaded = load(recipe)
    spec = loaded.spec
    folder = Path(recipe.output).expanduser() if recipe.output else default_folder(spec, recipe, backend)
    if folder.name in ("", ".."):
        raise UsageError(f"output {folder}: expected the name of a folder to make, such as {folder / 'bundle'}")
    with _partial(folder) as partial:
        _require_disk(partial, loaded)
        decoder = trace.Decoder(loaded.vae).eval() if loaded.vae is not None else None
        written = _write_graphs(partial, loaded, decoder, recipe.precision, progress)
        with progress.stage("reference by PyTorch"):
            reference = make_reference(
                loaded.model, decoder, loaded.diffusion, lambda done, steps: progress.step(done, steps, "reference")
            )
            save_reference(partial, reference)
        contract = _describe(partial, loaded, recipe, backend, written)
        manifest.write(partial, contract)
        built = _verify(partial, loaded, decoder, progress)
        files = {**contract.files, **manifest.describe_files(partial, skip=contract.files)}
        manifest.write(partial, replace(contract, files=files, parity=_summary(built)))
        return replace(built, folder=_put_in_place(partial, folder, built.passed))


@dataclass(frozen=True)
class Written:
    precision: str
    engines: dict[str, tuple[str, ...]]  # by backend: the files of its own form
    counts: dict[str, int]  # what each pass found


def _write_graphs(
    partial: Path, loaded: Loaded, decoder: trace.Decoder | None, precision: str, progress: Progress
) -> dict[str, Written]:
    spec = loaded.spec
    traced = partial / "traced"
    traced.mkdir()
    with progress.stage("trace: DiT to ONNX"):
        trace.export_dit(loaded.model).save(traced / "dit.onnx", external_data=True)
    with progress.stage("fuse: hoist, fold gains, pack, guidance"):
        fused = fuse(graphs.load(traced / "dit.onnx"), spec)
        graphs.save(fused.conditioner, partial / "conditioner.onnx")
        written = {"conditioner": Written("fp32", {}, {})}
        written["denoiser"] = _write(partial, "denoiser", fused.denoiser, precision, fused.counts, expected_counts(spec))
    if decoder is not None:
        with progress.stage("trace and fuse: VAE decoder to ONNX"):
            shape = (spec.channels, spec.latent_size, spec.latent_size)
            trace.export_decoder(decoder, shape).save(traced / "decoder.onnx", external_data=True)
            graph = graphs.load(traced / "decoder.onnx")
            graphs.sign(graph, *signatures(spec)["decoder"])
            counts = {"subpixel": subpixel(graph)}
            written["decoder"] = _write(partial, "decoder", graph, precision, counts, decoder.expected_counts())
    shutil.rmtree(traced)
    return written


def _write(
    partial: Path, name: str, graph: gs.Graph, precision: str, counts: dict[str, int], expected: dict[str, int]
) -> Written:
    """The portable graph in its precision, and beside it, with the same weights, the form of each backend."""
    if precision in narrow.TYPES:
        counts = counts | {"narrow": narrow.narrow(graph, precision)}
    graphs.save(graph, partial / f"{name}.onnx")
    engines = {}
    for backend, passes in LOWERINGS.items():
        if precision in backends.backend(backend).PRECISIONS:
            form = graph.copy()
            found = {rewrite.__name__: rewrite(form) for rewrite in passes}
            counts = counts | found
            if any(found.values()):
                engines[backend] = graphs.save(form, partial / f"{name}.{backend}.onnx")
    require(counts, expected)
    return Written(precision, engines, counts)


def _describe(
    partial: Path, loaded: Loaded, recipe: Recipe, backend: str, written: Mapping[str, Written]
) -> Manifest:
    spec = loaded.spec
    rows = {"conditioner": CONDITIONER_ROWS, "denoiser": recipe.max_batch, "decoder": DECODER_ROWS}
    described = {
        name: Graph(
            f"{name}.onnx",
            *signature,
            max_batch=rows[name],
            precision=written[name].precision,
            backend=backends.choose(backend, written[name].precision),
            engines=written[name].engines,
        )
        for name, signature in signatures(spec).items()
        if name in written
    }
    return Manifest(
        model={"name": table_name(spec), "resolution": spec.resolution, **asdict(spec)},
        latent_shape=(spec.channels, spec.latent_size, spec.latent_size),
        latent_scale=None if loaded.vae is None else float(loaded.vae.config.scaling_factor),
        num_classes=spec.num_classes,
        labels=loaded.labels,
        guided_channels=spec.guided_channels,
        unguided_up_to_one=spec.unguided_up_to_one,
        diffusion=loaded.diffusion,
        graphs=described,
        files=manifest.describe_files(partial),
        source={**loaded.source, "recipe": asdict(recipe)},
        built_with={"passes": {name: graph.counts for name, graph in written.items()}, "versions": _versions()},
    )


def _verify(partial: Path, loaded: Loaded, decoder: trace.Decoder | None, progress: Progress) -> Built:
    """The proof, then each graph against PyTorch, then the replay that `dit-run verify` does."""
    with Pipeline.load(partial) as pipe:
        built = check(pipe, loaded, decoder, progress)
    table = {"proof": _sensitivity(built), "passed": built.passed, "checks": [c.to_dict() for c in built.checks]}
    (partial / PARITY).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return built


def check(pipe: Pipeline, loaded: Loaded, decoder: trace.Decoder | None, progress: Progress) -> Built:
    """All checks of a bundle; made-up weights must be sensitive, a user's may not be, and that is reported."""
    reference = dit_runtime.verify.load_reference(pipe.folder)
    with progress.stage("verify: proof that the checks can fail"):
        checks = proof(pipe, reference)
    sensitive = all(check.passed for check in checks)
    if not sensitive and loaded.source["kind"] != "synthetic":
        checks = []
    with progress.stage("verify: each graph against PyTorch"):
        checks += graph_parity(pipe, loaded.model, decoder)
    with progress.stage("verify: replay of the reference"):
        checks += dit_runtime.verify.verify(pipe, lambda done, total: progress.step(done, total, "replay"))
    with twins(pipe) as rounded:
        if rounded is not None:
            with progress.stage("verify: the rounding twins"):
                again = [*graph_parity(rounded, loaded.model, decoder), *dit_runtime.verify.verify(rounded)]
                checks += [replace(entry, name=f"twin: {entry.name}") for entry in again]
    return Built(pipe.folder, checks, sensitive)


def _sensitivity(built: Built) -> str:
    return "sensitive" if built.sensitive else "insensitive"


def _summary(built: Built) -> dict[str, Any]:
    worst: dict[str, float | str] = {}
    for entry in built.checks:
        values = [check.value for check in built.checks if check.name == entry.name]
        worst[entry.name] = entry.to_dict()["value"] if len(values) == 1 else (min if entry.at_least else max)(values)
    return {"proof": _sensitivity(built), "passed": built.passed, "worst": worst}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _require_disk(partial: Path, loaded: Loaded) -> None:
    """The traced graph and the bundle's own are on disk at the same time."""
    modules = [loaded.model] + ([loaded.vae.decoder] if loaded.vae is not None else [])
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    needed, free = 2 * weights + (64 << 20), shutil.disk_usage(partial).free
    if free < needed:
        raise UsageError(f"{partial.parent}: {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB for this build")


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not (folder / manifest.NAME).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is no bundle; refusing to replace it: choose another -o")


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """A folder beside the destination, gone whatever happens; the destination is only ever a whole bundle."""
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path, passed: bool) -> Path:
    """Renames; a bundle that failed goes to FOLDER.failed, to be looked at, and replaces nothing."""
    if not passed:
        folder = folder.with_name(folder.name + ".failed")
        _refuse_foreign(folder)
    old = folder.parent / f".{folder.name}.old-{os.getpid()}"
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder
