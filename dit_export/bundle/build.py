"""Build a verified bundle from a recipe: load, trace, assemble, make the reference, compile, verify, put in place."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from dit_export.bundle.assemble import Assembly
from dit_export.bundle.inputs import Inputs, read_inputs, require_consistent, with_prompts
from dit_export.bundle.place import DiskFull, put_in_place, refuse_foreign, require_disk, workplace
from dit_export.bundle.presets import read_presets
from dit_export.bundle.sizes import join, load_again, together
from dit_export.bundle.tracing import trace_graphs
from dit_export.checkpoints import Loaded, load
from dit_export.graph.oracle import Oracle
from dit_export.networks.codec import make_decoder
from dit_export.networks.encoding import make_encoder
from dit_export.networks.spec import ModelSpec
from dit_export.precision.budget import SearchOptions
from dit_export.precision.calibrate import Calibration
from dit_export.precision.search import Found, OutOfReach, Search, first_broken
from dit_export.recipe import Recipe, wider
from dit_export.verify import report, traced
from dit_export.verify.check import Built, check, compare, summary
from dit_export.verify.metrics import PROOF, sentence
from dit_export.verify.reference import LEAST_STEPS, MAX_STEPS, make_reference, save_reference
from dit_export.verify.text import first_failure, save_prompts
from dit_runtime import backends
from dit_runtime.backends import Options
from dit_runtime.bundle import manifest
from dit_runtime.bundle.compiling import compile_stages
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.errors import UsageError
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.verify import Figure, batch_invariant

PARITY = "parity.json"
SEARCHED = 2  # copies of the weights that a search has on disk: the smoothed graphs, and two forms in int8


def default_folder(loaded: Loaded, recipe: Recipe, backend: str) -> Path:
    """Return engines/build/dit-NAME-…-RESOLUTION-PRECISION-BACKEND, the name as the network's model table says it."""
    model = loaded.network.model
    name = str(model.get("name", "network")).replace("/", "-").lower()
    way = model.get("conditioning", ModelSpec.conditioning)
    way = "" if way == ModelSpec.conditioning else way
    size = "+".join(map(str, recipe.sizes)) if recipe.sizes[1:] else str(model.get("resolution", ""))
    parts = ("dit", name, way, size, recipe.prediction, recipe.precision, backend)
    return Path("engines/build") / "-".join(part for part in parts if part)


def build(
    recipe: Recipe,
    progress: Progress,
    options: SearchOptions | None = None,
    loaded: Loaded | None = None,
) -> Built:
    """Build and verify a bundle; `loaded` is a network of the caller's own instead of the recipe's checkpoint.

    Several sizes are built one after the other. All use the first size's calibration. Layers that stay float at one
    size stay float at the sizes after it.

    If the gates of an int8 or fp8 build fail, it is repeated with the fewest float layers that pass, unless the recipe
    is strict. With `options`, the search of `dit-export quantize` comes first. The manifest's recipe names the
    float layers.
    """
    require_consistent(recipe)
    if loaded is not None and recipe.sizes[1:]:
        raise UsageError(f"resolution {recipe.resolution}; expected one, for this network is the caller's own")
    output = Path(recipe.output).expanduser() if recipe.output else None
    if output is not None:
        refuse_foreign(output)  # before the long work
    backend = backends.choose(recipe.backend, recipe.precision)
    backends.require(backend, recipe.precision, recipe.tuning)
    if line := backends.note(backend, recipe.precision):
        progress.say(line)
    with progress.stage("weights"):
        loaded = loaded or load(recipe)
        inputs = read_inputs(recipe, loaded)
        if options is not None:
            options.check(backend, loaded.vae is not None)
        presets = read_presets(Path(recipe.presets).expanduser(), loaded.process) if recipe.presets else {}
    inputs = with_prompts(inputs, recipe, loaded, progress)
    if loaded.note:
        progress.say(loaded.note)
    folder = output or default_folder(loaded, recipe, backend)
    if folder.name in ("", ".."):
        raise UsageError(f"output {folder}: expected the name of a folder to make, such as {folder / 'bundle'}")
    with workplace(folder) as work:
        made = _make(
            work / "first", loaded, replace(recipe, resolution=recipe.sizes[0]), backend, progress, inputs, options
        )
        calibration, sizes = made.calibration, {made.contract.size: made.built}
        partial, contract, last, examples = made.folder, made.contract, made.recipe, loaded.examples
        for size in recipe.sizes[1:]:
            if not made.built.passed:
                break
            with progress.stage(f"weights, for {size}"):
                loaded = load_again(recipe, size, loaded)
            last = replace(last, resolution=size, judge=None)
            again = Inputs(calibration) if calibration is not None else inputs
            made = _make(work / "next", loaded, last, backend, progress, again, options, LEAST_STEPS)
            last = made.recipe
            if made.built.passed:
                contract, sizes[made.contract.size] = join(partial, contract, made.folder, made.contract), made.built
                shutil.rmtree(work / "next")
            else:  # that one is what there is to look at
                partial, contract, sizes = made.folder, made.contract, {made.contract.size: made.built}
        if contract.sizes:
            table = asdict(replace(last, resolution=recipe.resolution, judge=recipe.judge, timing_cache=None))
            contract = replace(contract, source={**contract.source, "recipe": table})
        contract = _with_new_files(partial, contract)
        for name, built in sizes.items():
            sized = contract.at(name)
            text = report.html(partial, report.page(folder.name, sized, built))
            (partial / sized.own(report.NAME)).write_text(text, encoding="utf-8")
        for name, arrays in examples.items():
            np.savez(partial / f"{name}.npz", **arrays)
        manifest.write(partial, replace(_with_new_files(partial, contract), presets=presets))
        built = replace(together(sizes), folder=put_in_place(partial, folder, made.built.passed))
    if calibration is not None and recipe.calibration is None:
        calibration.save(built.folder.with_name(f"{built.folder.name}.calibration.npz"))
    return built


class Made(NamedTuple):
    """A verified bundle of one size."""

    folder: Path
    contract: Manifest
    recipe: Recipe  # with the layers that stay float
    built: Built
    calibration: Calibration | None


def _make(
    work: Path,
    loaded: Loaded,
    recipe: Recipe,
    backend: str,
    progress: Progress,
    inputs: Inputs,
    options: SearchOptions | None,
    steps: int = MAX_STEPS,
) -> Made:
    """Build and verify one size; its reference has at most so many steps."""
    partial, plain = work / "bundle", work / "plain"
    partial.mkdir(parents=True)
    copies = 4 if backends.typed(backend, recipe.precision) else 2
    require_disk(partial, loaded, copies + (SEARCHED if options is not None else 0))
    decoder = make_decoder(loaded.vae) if loaded.vae is not None else None
    encoder = make_encoder(loaded.vae) if recipe.encoder else None
    oracle = trace_graphs(plain, loaded, decoder, progress, encoder)
    making = Making(Assembly(partial, plain, loaded, decoder, recipe, backend, progress, inputs=inputs))
    making.write()
    _make_reference(making.assembly, oracle, steps)
    if options is not None:
        making.search(lambda search, fixed: search.run(options, fixed))
    built = making.verify()
    if (broken := first_failure(making.contract, built.checks)) and not making.assembly.text_in_fp32:
        built = making.with_text_in_fp32(broken)
        broken = first_failure(making.contract, built.checks)
    if broken:
        text = "the text encoders fail in fp32, too: pass --without-text-encoders to build for prompt embeddings"
        built = replace(built, advice=text, changes=[{"without_text_encoders": True}])
    elif not built.passed and recipe.precision in backends.QUANTIZED:
        built = _within_gates(making, built)
    elif not built.passed and built.sensitive and recipe.precision != "fp32":
        built = replace(built, changes=wider(backend, recipe.precision))
    invariant = batch_invariant(making.contract, built.checks)
    contract = replace(making.contract, parity=summary(built), batch_invariant=invariant)
    return Made(partial, contract, making.assembly.recipe, built, making.assembly.measured.calibration)


def _with_new_files(folder: Path, contract: Manifest) -> Manifest:
    return replace(contract, files={**contract.files, **manifest.describe_files(folder, skip=contract.files)})


def _with_judge(partial: Path, contract: Manifest, recipe: Recipe) -> Manifest:
    """Bring the recipe's judge into the bundle, and name its files in the manifest."""
    if recipe.judge is None:
        return contract
    path = Path(recipe.judge).expanduser()
    onnx.save(onnx.load(path), partial / "judge.onnx")  # with its weights, wherever they are
    names = {"features": "judge.onnx"}
    if path.with_suffix(".npz").exists():
        shutil.copyfile(path.with_suffix(".npz"), partial / "judge.npz")
        names["real"] = "judge.npz"
    return replace(contract, built_with={**contract.built_with, "judge": names})


@dataclass
class Making:
    """A bundle that is written, compiled and verified, and written again where a search keeps layers in float."""

    assembly: Assembly
    contract: Manifest = field(init=False)
    searched: Found | None = None  # by all searches so far

    def write(self) -> None:
        assembly = self.assembly
        (assembly.folder / PARITY).unlink(missing_ok=True)  # of what was there before
        self.contract = _with_judge(assembly.folder, assembly.run(), assembly.recipe)

    def search(self, look: Callable[[Search, Sequence[str]], Found]) -> Found:
        """Let `look` find what stays float, and write the bundle again with that."""
        first, folder = self.assembly, self.assembly.folder
        require_disk(folder, first.loaded, SEARCHED)
        self.assembly = first.once_more()
        smoothed, fixed = self.assembly.smoothed, first.recipe.keep_float or []
        assert smoothed is not None

        def tick(done: int, total: int) -> None:
            first.progress.step(done, total, "layers")

        with (
            first.progress.stage("search: layers in turn"),
            Search(folder, self.contract, smoothed, first.loaded.network, tick, first.decode) as search,
        ):
            outcome = look(search, fixed)
        self.searched = both = outcome if self.searched is None else self.searched.then(outcome)
        self.assembly.recipe = replace(first.recipe, keep_float=outcome.keep or None)
        self.write()
        if both.cost:
            self.contract = replace(self.contract, built_with={**self.contract.built_with, "kept_float": both.cost})
        table = [layer._asdict() for layer in both.layers]
        (folder / report.SENSITIVITY).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        return outcome

    def with_text_in_fp32(self, broken: Figure) -> Built:
        """Write the text encoders again in fp32, and verify the bundle with them."""
        reason = sentence(broken)
        self.assembly.progress.say(f"the text encoders stay in fp32: {reason}")
        self.assembly.write_text_in_fp32(reason)
        (self.assembly.folder / PARITY).unlink()  # of what was there before
        assert self.assembly.contract is not None
        stages, built_with = self.assembly.contract.stages, self.assembly.contract.built_with
        self.contract = replace(self.contract, stages=stages, built_with={**self.contract.built_with, **built_with})
        return self.verify()

    def verify(self) -> Built:
        """Compile, then run the proof, each graph against PyTorch, and the replay that `dit-run verify` does."""
        assembly, folder = self.assembly, self.assembly.folder
        contract = replace(self.contract, files=manifest.describe_files(folder))
        tuning = Options(tuning=assembly.recipe.tuning)
        self.contract = compile_stages(folder, contract, assembly.backend, tuning, assembly.progress)
        manifest.write(folder, self.contract)
        built = check(folder, assembly.loaded, assembly.decoder, assembly.progress)
        figures = {"proof_figures": built.proof, "checks": built.checks}
        table = summary(built) | {name: [figure.to_dict() for figure in rows] for name, rows in figures.items()}
        (folder / PARITY).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        return built


def _make_reference(assembly: Assembly, oracle: Oracle, steps: int = MAX_STEPS) -> None:
    """Write PyTorch's run, and what leads from the bundle back to PyTorch."""
    loaded, folder = assembly.loaded, assembly.folder
    (step,) = [graph for name, graph in assembly.graphs.items() if assembly.runs[name] == "step"]
    with assembly.progress.stage("reference by PyTorch"):
        origins = traced.trace_back(step, assembly.packs, oracle)
        traced.write(folder, origins)
        reference = make_reference(
            loaded.network,
            assembly.decoder,
            loaded.process,
            oracle,
            origins.packs,
            assembly.divisors,
            lambda done, steps: assembly.progress.step(done, steps, "reference"),
            steps,
            make_encoder(loaded.vae) if assembly.recipe.encoder else None,
        )
        save_reference(folder, reference, origins.packs, assembly.divisors)
        if loaded.text is not None:
            save_prompts(folder, loaded.text)


def _within_gates(making: Making, built: Built) -> Built:
    """Verify the bundle again with the fewest float layers that pass its gates, or say why none do."""
    assembly, precision = making.assembly, making.contract.step.precision
    end = making.contract.end
    broken = [figure for figure in built.checks if end is None or not figure.stage.endswith(end.name)]
    if end is not None and all(figure.passed for figure in broken):
        changes = wider(assembly.backend, end.precision)
        text = f"only the decoder fails, which is in {end.precision}: "
        if end.precision == "int8":
            text += "keep it in float with --keep-float decoder, or "
            changes = [{"keep_float": [*(assembly.recipe.keep_float or []), "decoder"]}, *changes]
        return replace(built, advice=text + _said(changes), changes=changes)
    if assembly.recipe.strict:
        text = "strict: no layer was tried in float; without --strict the build keeps the fewest that the gates need"
        return replace(built, advice=text, changes=[{"strict": False}])

    def gates(pipe: Pipeline) -> Sequence[Figure]:
        return compare({"": pipe}, built.reference, assembly.loaded, None, Progress(io.StringIO())).checks

    known = broken if assembly.backend in backends.CPU else ()  # elsewhere the portable graphs are searched

    try:
        outcome = making.search(lambda search, fixed: search.meet(gates, f"{precision}'s gate", fixed, known))
    except OutOfReach as error:
        making.assembly = assembly
        if error.figure.stage == PROOF:
            text = "these weights hardly react to their inputs: no precision passes; check the checkpoint"
            return replace(built, advice=f"{error}\n{text}")
        changes = wider(assembly.backend)
        text = f"{_said(changes)}, or more of your own --conditions to calibrate with"
        return replace(built, advice=f"{error}\n{text}", changes=changes)
    except DiskFull as error:
        text = "a search for the layers that must stay in float needs this room: make it, and build again"
        return replace(built, advice=f"{error}\n{text}")
    again = making.verify()
    if again.passed:
        return again
    if outcome.cost:
        text = f"with {', '.join(outcome.keep)} in float a gate still fails: {sentence(first_broken(again.checks))}"
        changes = wider(assembly.backend)
        return replace(again, advice=f"{text}\n{_said(changes)}", changes=changes)
    around = making.contract.end.precision if making.contract.end else "float"
    text = f"{precision} passes in fp32; what fails is {around} around it"
    changes = wider(assembly.backend, around)
    return replace(again, advice=f"{text}\n{_said(changes)}", changes=changes)


def _said(changes: Sequence[Mapping[str, Any]]) -> str:
    names = [change["precision"] for change in changes if "precision" in change]
    return f"try {' or '.join(f'--precision {name}' for name in names)}"
