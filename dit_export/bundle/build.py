"""A recipe to a verified bundle: trace, fuse, write, verify, and only then put in place."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dit_runtime.verify
from dit_export.bundle.write import describe, fuse_graphs, int8_of, precisions_of, read_given, trace_graphs, wide_of
from dit_export.checkpoints import Loaded, load
from dit_export.graph import trace
from dit_export.networks.spec import ModelSpec, table_name
from dit_export.precision.calibrate import Plan as CalibrationPlan
from dit_export.precision.search import Wish
from dit_export.precision.twin import twins
from dit_export.recipe import PRECISIONS, Recipe, sides
from dit_export.verify import report
from dit_export.verify.parity import FINITE_LABELS, finite, graph_parity, proof
from dit_export.verify.reference import make_reference, save_reference
from dit_runtime import backends
from dit_runtime.backends import Options
from dit_runtime.bundle import manifest
from dit_runtime.bundle.compiling import compile_graphs, obstacle
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.errors import UsageError
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.replay import Reference, Replay, load_reference, replay
from dit_runtime.verify import Check

PARITY = "parity.json"


@dataclass(frozen=True)
class Built:
    folder: Path
    proof: list[Check]
    checks: list[Check]  # the gates; the proof is one of them unless the weights are a user's and fail it
    reference: Reference
    replay: Replay

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def sensitive(self) -> bool:
        return all(check.passed for check in self.proof)


def default_folder(spec: ModelSpec, recipe: Recipe, backend: str) -> Path:
    size = table_name(spec).replace("/", "-").lower()
    way = "" if spec.conditioning == ModelSpec.conditioning else spec.conditioning
    parts = ("dit", size, way, str(spec.resolution), recipe.prediction, recipe.precision, backend)
    return Path("engines/build") / "-".join(part for part in parts if part)


def build(
    recipe: Recipe,
    progress: Progress,
    wish: Wish | None = None,
    traced: Path | None = None,
) -> Built:
    """With a wish, an int8 build also finds out which layers stay float; the manifest's recipe then names them.

    `traced` is a folder where the graphs of these weights were traced before, or are put now for the next build.
    """
    if recipe.precision not in PRECISIONS:
        raise UsageError(f"precision {recipe.precision!r} is not known; known: {', '.join(PRECISIONS)}")
    if recipe.max_batch < 1:
        raise UsageError(f"max-batch {recipe.max_batch}; expected at least 1")
    if recipe.resolution is not None:
        sides(recipe.resolution)
    for name in ("keep_float", "calibration", "captions") if recipe.precision not in backends.QUANTIZED else ():
        if value := getattr(recipe, name):
            option = name.replace("_", "-")
            raise UsageError(f"{option} {value} is for int8 and fp8; this build is {recipe.precision}")
    if recipe.calibration and recipe.captions:
        both = f"a calibration ({recipe.calibration}) and captions to calibrate with ({recipe.captions})"
        raise UsageError(f"got both {both}: pass one of them")
    output = Path(recipe.output).expanduser() if recipe.output else None
    if output is not None:
        _refuse_foreign(output)  # before the long work
    backend = backends.choose(recipe.backend, recipe.precision)
    backends.require(backend, recipe.precision, recipe.tuning)
    with progress.stage("weights"):
        loaded = load(recipe)
        given = read_given(recipe, loaded.spec)
        if wish is not None:
            wish.check(backend, loaded.vae is not None)
    folder = output or default_folder(loaded.spec, recipe, backend)
    if folder.name in ("", ".."):
        raise UsageError(f"output {folder}: expected the name of a folder to make, such as {folder / 'bundle'}")
    with _partial(folder) as partial:
        _require_disk(partial, loaded, 4 if backends.typed(backend, recipe.precision) else 2)
        decoder = trace.Decoder(loaded.vae).eval() if loaded.vae is not None else None
        own = partial / "traced"
        traced = traced or own
        if not traced.exists():
            trace_graphs(traced, loaded, decoder, progress)
        int8 = int8_of(traced, loaded, recipe, backend, given, CalibrationPlan(), progress, wish)
        if int8 is not None and wish is not None:
            recipe = replace(recipe, keep_float=int8.keep)
            table = [entry._asdict() for entry in int8.table]
            (partial / report.SENSITIVITY).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        precisions = precisions_of(recipe.precision, backend)
        wide = wide_of(traced, loaded, backend, recipe.precision, progress)
        fused = fuse_graphs(traced, partial, loaded, decoder, precisions, int8, progress, backend, wide)
        shutil.rmtree(own, ignore_errors=True)
        with progress.stage("reference by PyTorch"):
            reference = make_reference(
                loaded.model,
                decoder,
                loaded.diffusion,
                lambda done, steps: progress.step(done, steps, "reference"),
                fused.divisors,
            )
            save_reference(partial, reference)
        contract = describe(partial, loaded, recipe, backend, fused.graphs)
        if wide:
            contract = replace(contract, built_with={**contract.built_with, "wide": wide})
        contract = compile_graphs(partial, contract, backend, Options(tuning=recipe.tuning), progress)
        manifest.write(partial, contract)
        built = _verify(partial, loaded, decoder, progress)
        text = report.html(partial, page(folder.name, contract, built))
        (partial / report.NAME).write_text(text, encoding="utf-8")
        files = {**contract.files, **manifest.describe_files(partial, skip=contract.files)}
        manifest.write(partial, replace(contract, files=files, parity=_summary(built)))
        built = replace(built, folder=_put_in_place(partial, folder, built.passed))
    if int8 is not None and recipe.calibration is None:
        int8.calibration.save(folder.with_name(f"{folder.name}.calibration.npz"))
    return built


def _verify(partial: Path, loaded: Loaded, decoder: trace.Decoder | None, progress: Progress) -> Built:
    """The proof, then each graph against PyTorch, then the replay that `dit-run verify` does."""
    built = check(partial, loaded, decoder, progress)
    figures = {"proof_figures": built.proof, "checks": built.checks}
    table = _summary(built) | {name: [entry.to_dict() for entry in found] for name, found in figures.items()}
    (partial / PARITY).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return built


def page(name: str, contract: Manifest, built: Built) -> report.Page:
    """What a person reads, from what the checks have measured."""
    failures = [f"{check.name}: {check.value:.4g}, {check.where}" for check in built.checks if not check.passed][:1]
    rows = report.of_checks(built.checks)
    return report.Page(name, contract, built.reference, built.replay, rows, failures, built.passed)


def check(folder: Path, loaded: Loaded, decoder: trace.Decoder | None, progress: Progress, **options: Any) -> Built:
    """All checks of a bundle: by its engines where they run here, and by the rounding twins of its typed graphs.

    Made-up weights must be sensitive; a user's may not be, and that is reported.
    """
    contract, reference = manifest.read(folder), load_reference(folder)
    with ExitStack() as opened:
        pipes: dict[str, Pipeline] = {}
        if not obstacle(contract):
            pipes[""] = opened.enter_context(Pipeline.load(folder, **options))
        if rounded := opened.enter_context(twins(folder, contract, always=not pipes)):
            pipes["twin: "] = rounded
        with progress.stage("verify: proof that the checks can fail"):
            proven = proof(next(iter(pipes.values())), reference)
        required = loaded.source["kind"] == "synthetic" or all(check.passed for check in proven)
        checks = list(proven) if required else []
        answered = []
        for name, pipe in pipes.items():
            with progress.stage(f"verify: {name}each graph against PyTorch"):
                found = [*graph_parity(pipe, loaded.model, decoder)]
            with progress.stage(f"verify: {name}replay of the reference"):
                tick = lambda done, total: progress.step(done, total, "replay")  # noqa: E731
                answered.append(replay(pipe, reference, tick))
            found += dit_runtime.verify.judge(contract, reference, answered[-1])
            if name:
                with progress.stage(f"verify: {name}{FINITE_LABELS} classes, every step finite"):
                    found.append(finite(pipe, reference))
            checks += [replace(entry, name=name + entry.name) for entry in found]
    return Built(folder, proven, checks, reference, answered[0])


def _summary(built: Built) -> dict[str, Any]:
    return dit_runtime.verify.summary("sensitive" if built.sensitive else "insensitive", built.checks)


def _require_disk(partial: Path, loaded: Loaded, copies: int) -> None:
    """The traced graph and the bundle's own are on disk at one time; a typed one's fp32 form and engine besides."""
    modules = [loaded.model] + ([loaded.vae.decoder] if loaded.vae is not None else [])
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    needed, free = copies * weights + (64 << 20), shutil.disk_usage(partial).free
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
    partial = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()  # no pid in its name: a killed build's stays, and in containers pids return
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path, passed: bool) -> Path:
    """Renames; a bundle that failed goes to FOLDER.failed, to be looked at, and replaces nothing."""
    if not passed:
        folder = folder.with_name(folder.name + ".failed")
        _refuse_foreign(folder)
    old = folder.parent / f".{folder.name}.old-{secrets.token_hex(4)}"
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder
