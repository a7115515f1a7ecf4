"""Weights to the files of a bundle: trace, fuse, write each graph and its forms, and say so in the manifest."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from dit_export.checkpoints import Loaded
from dit_export.graph import onnxfile, trace
from dit_export.networks.spec import ModelSpec, signatures, table_name
from dit_export.passes import LOWERINGS, expected_counts, fuse, require
from dit_export.passes.subpixel import subpixel
from dit_export.passes.update import update
from dit_export.precision import attention, half
from dit_export.precision.calibrate import BACKEND, Calibration, calibrate
from dit_export.precision.calibrate import Plan as CalibrationPlan
from dit_export.precision.layers import find, named
from dit_export.precision.peaks import ENDS, PLAN, near_the_end, peaks
from dit_export.precision.prompts import Prompts, read
from dit_export.precision.qdq import quantize
from dit_export.precision.search import Entry, Found, Search, Wish
from dit_export.precision.smooth import smooth, vector_divisors
from dit_export.recipe import Recipe
from dit_runtime import backends
from dit_runtime.backends import QUANTIZED, Options
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Graph, Manifest
from dit_runtime.progress import Progress

CONDITIONER_ROWS = 64  # (t, label) pairs a call: of XL/2's 783 kB a pair 50 MB
CONTEXT_ROWS = 8  # captions a call: of XL/2's 31 MB
DECODER_ROWS = 2  # a 512 px picture's activations are hundreds of MB, and a batch gains nothing on a CPU
Wide = dict[str, dict[str, float]]  # by graph and tensor, the largest magnitude that was seen
TOOLS = ("dit-export", "torch", "onnx", "onnxscript", "onnx-graphsurgeon", "diffusers", "numpy")


@dataclass(frozen=True)
class Written:
    precision: str
    engines: dict[str, tuple[str, ...]]  # by backend: the files of its own form
    counts: dict[str, int]  # what each pass found
    islands: tuple[str, ...] = ()  # products of a typed graph that stay fp32


def trace_graphs(folder: Path, loaded: Loaded, decoder: trace.Decoder | None, progress: Progress) -> None:
    """The plain exports that a build starts from: dit.onnx and, where there is a VAE, decoder.onnx."""
    spec = loaded.spec
    folder.mkdir()
    with progress.stage("trace: DiT to ONNX"):
        trace.export_dit(loaded.model).save(folder / "dit.onnx", external_data=True)
    if decoder is not None:
        with progress.stage("trace: VAE decoder to ONNX"):
            trace.export_decoder(decoder, spec.latent_shape).save(folder / "decoder.onnx", external_data=True)


@dataclass(frozen=True)
class Int8:
    """How the denoiser is quantized."""

    calibration: Calibration
    keep: list[str]  # what stays float, as a recipe says it
    table: list[Entry] = field(default_factory=list)  # each layer by itself, where that was asked for


class Given(NamedTuple):
    """What a recipe brings along for int8 and fp8."""

    calibration: Calibration | None
    prompts: Prompts | None


@dataclass(frozen=True)
class Bundled:
    graphs: dict[str, Written]
    divisors: NDArray[np.float32] | float = 1.0  # (K + M, D): what smoothing folded into what leaves the loop


def fuse_graphs(
    traced: Path,
    folder: Path,
    loaded: Loaded,
    decoder: trace.Decoder | None,
    precisions: Mapping[str, str],
    int8: Int8 | None,
    progress: Progress,
    backend: str,
    wide: Mapping[str, Collection[str]] | None = None,
) -> Bundled:
    """The bundle's graphs from the traced ones: fused, in their precision, with the forms of each backend.

    Where the backend computes by the types of the graph, the graph is typed, but for what is `wide`.
    """
    spec, precision = loaded.spec, precisions["denoiser"]
    divisors: NDArray[np.float32] | float = 1.0
    kept: list[str] = []
    lowerings = LOWERINGS
    with progress.stage("fuse: hoist, fold gains, pack, guidance, sub-pixel"):
        conditioner, context, denoiser, counts = fuse(onnxfile.load(traced / "dit.onnx"), spec)
        if int8 is not None:
            kept = named(find(denoiser), int8.keep)
            chosen = smooth(conditioner, denoiser, int8.calibration, context=context)
            grids = attention.steps(denoiser, int8.calibration, kept)
            lowerings = {backend: attention.passes(backend, grids) for backend in LOWERINGS}
            divisors = vector_divisors(denoiser, chosen, spec.hidden)
            counts |= {"quantize": quantize(denoiser, chosen, kept, kind=precision)}
        onnxfile.save(conditioner, folder / "conditioner.onnx")
        written = {"conditioner": Written("fp32", {}, {})}
        if context is not None:
            onnxfile.save(context, folder / "context.onnx")
            written["context"] = Written("fp32", {}, {})
        target = Target(precision, backend, (wide or {}).get("denoiser", ()))
        expected = expected_counts(spec, precision, kept)
        written["denoiser"] = _write(folder, "denoiser", denoiser, target, counts, expected, lowerings)
        onnxfile.save(update(signatures(spec)["update"]), folder / "update.onnx")
        (folder / onnxfile.data_name("update.onnx")).touch()  # a graph is two files, with weights or without
        written["update"] = Written("fp32", {}, {})
        if decoder is not None:
            graph = onnxfile.load(traced / "decoder.onnx")
            onnxfile.sign(graph, *signatures(spec)["decoder"])
            counts = {"subpixel": subpixel(graph)}
            target = Target(precisions["decoder"], backend, (wide or {}).get("decoder", ()))
            written["decoder"] = _write(folder, "decoder", graph, target, counts, decoder.expected_counts())
    return Bundled(written, divisors)


def precisions_of(precision: str, backend: str) -> dict[str, str]:
    """Of denoiser and decoder: beside an int8 or fp8 denoiser, convolutions are as its float parts."""
    around = backends.backend(backend).AROUND if precision in QUANTIZED else precision
    return {"denoiser": precision, "decoder": around}


def read_given(recipe: Recipe, spec: ModelSpec) -> Given:
    return Given(
        Calibration.load(Path(recipe.calibration).expanduser()) if recipe.calibration else None,
        read(Path(recipe.captions).expanduser(), spec) if recipe.captions else None,
    )


def int8_of(
    traced: Path,
    loaded: Loaded,
    recipe: Recipe,
    backend: str,
    given: Given,
    plan: CalibrationPlan,
    progress: Progress,
    wish: Wish | None = None,
) -> Int8 | None:
    """How an int8 or fp8 denoiser is quantized: by the recipe, and by what the fp32 one shows at work."""
    if recipe.precision not in QUANTIZED:
        return None
    keep, (calibration, prompts) = recipe.keep_float or [], given
    if calibration is not None and wish is None:
        return Int8(calibration, keep)
    folder = traced / "fp32"
    unverified(folder, traced, replace(loaded, vae=None), Recipe(backend=BACKEND, max_batch=plan.batch), progress)
    named(find(onnxfile.load(folder / "denoiser.onnx")), keep)  # before the long work
    if calibration is None:
        with progress.stage(f"calibrate: {plan.pictures} pictures, {plan.steps} steps"):
            calibration = calibrate(folder, plan, lambda done, total: progress.step(done, total, "calibrate"), prompts)
    found = Found(keep, [])
    if wish is not None:
        decoder = None if loaded.vae is None else backends.backend(BACKEND).open([traced / "decoder.onnx"], Options())

        def tick(done: int, total: int) -> None:
            progress.step(done, total, "layers")

        with progress.stage("quantize: layers one by one"):
            search = Search(folder, calibration, backend, decoder, tick)
            found = search.run(wish, keep)
    shutil.rmtree(folder)
    return Int8(calibration, found.keep, found.table)


def wide_of(traced: Path, loaded: Loaded, backend: str, precision: str, progress: Progress) -> Wide:
    """By graph, what a typed one cannot hold in its narrow type; nothing where it ends no sooner than fp32."""
    inner = backends.typed(backend, precision)
    if inner not in ENDS:
        return {}
    folder = traced / "fp32"
    unverified(folder, traced, loaded, Recipe(backend=BACKEND, max_batch=PLAN.batch), progress)
    with progress.stage(f"peaks: {PLAN.pictures} pictures, {PLAN.steps} steps"):
        seen = peaks(folder, PLAN, lambda done, total: progress.step(done, total, "peaks"))
    shutil.rmtree(folder)
    return {name: near_the_end(found, inner) for name, found in seen.items()}


class Target(NamedTuple):
    precision: str
    backend: str
    wide: Collection[str]


def _write(
    folder: Path,
    name: str,
    graph: gs.Graph,
    target: Target,
    counts: dict[str, int],
    expected: dict[str, int],
    lowerings: Mapping[str, Sequence[attention.Pass]] = LOWERINGS,
) -> Written:
    """The portable graph in its precision, and beside it, with the same weights, the form of each backend."""
    precision, typed = target.precision, backends.typed(target.backend, target.precision)
    islands = half.islands(graph, target.wide) if typed else []
    if typed:
        counts = counts | {"narrow": half.narrow(graph, typed, target.wide)}
        expected = expected | {"narrow": expected["narrow"] - len(islands)}
    onnxfile.save(graph, folder / f"{name}.onnx")
    engines = {}
    for backend, passes in lowerings.items():
        if precision in backends.backend(backend).PRECISIONS and backends.typed(backend, precision) == typed:
            form = graph.copy()
            found = {rewrite.__name__: rewrite(form) for rewrite in passes}
            counts = counts | found
            if any(found.values()):
                engines[backend] = onnxfile.save(form, folder / f"{name}.{backend}.onnx")
    require(counts, expected)
    return Written(precision, engines, counts, tuple(node.name for node in islands))


def describe(folder: Path, loaded: Loaded, recipe: Recipe, backend: str, written: Mapping[str, Written]) -> Manifest:
    spec = loaded.spec
    rows = {
        "conditioner": CONDITIONER_ROWS,
        "context": CONTEXT_ROWS,
        "denoiser": recipe.max_batch,
        "update": recipe.max_batch,
        "decoder": DECODER_ROWS,
    }
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
        latent_shape=spec.latent_shape,
        latent_scale=None if loaded.vae is None else float(loaded.vae.config.scaling_factor),
        num_classes=spec.num_classes,
        labels=loaded.labels,
        guided_channels=spec.guided_channels,
        unguided_up_to_one=spec.unguided_up_to_one,
        diffusion=loaded.diffusion,
        graphs=described,
        files=manifest.describe_files(folder),
        source={**loaded.source, "recipe": asdict(replace(recipe, timing_cache=None))},  # a file of this machine alone
        built_with={
            "passes": {name: graph.counts for name, graph in written.items()},
            "versions": _versions(),
            "islands": {name: list(graph.islands) for name, graph in written.items() if graph.islands},
        },
    )


def _versions() -> dict[str, str]:
    found = {name: here for name, here in backends.versions().items() if here is not None}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def unverified(folder: Path, traced: Path, loaded: Loaded, recipe: Recipe, progress: Progress) -> None:
    """A bundle's graphs and manifest, and no proof that they are right: to measure and throw away, never to ship."""
    backend = backends.choose(recipe.backend, recipe.precision)
    decoder = None if loaded.vae is None else trace.Decoder(loaded.vae)
    plan = CalibrationPlan(pictures=1, steps=4, batch=1)
    int8 = int8_of(traced, loaded, recipe, backend, read_given(recipe, loaded.spec), plan, progress)
    folder.mkdir()
    precisions = precisions_of(recipe.precision, backend)
    fused = fuse_graphs(traced, folder, loaded, decoder, precisions, int8, progress, backend)
    manifest.write(folder, describe(folder, loaded, recipe, backend, fused.graphs))
