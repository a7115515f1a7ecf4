"""A bundle's stages to engines of one backend: on the target by `dit-run compile`, anywhere by `dit-export build`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dit_runtime import backends
from dit_runtime.backends import Options
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest, Stage
from dit_runtime.progress import Progress


class Change(NamedTuple):
    """A stage with engines of a backend, and what the manifest no longer says of others."""

    stage: Stage
    given_up: Collection[str]  # backends whose engines are missing or cut short
    built: Mapping[str, Any] | None  # with what and for what its engine was made; None: it opens the ONNX form


def compile_stages(folder: Path, contract: Manifest, backend: str, options: Options, progress: Progress) -> Manifest:
    """Return the manifest with this backend, or its place beside it, for every stage, and with the engines made.

    No manifest is written. What the new engines replace is named no more, and still there; engines that are missing or
    cut short, of whichever backend, are not named either. Nothing was verified yet.
    """
    owners = {stage.name: (stage, size) for size in contract.each_size for stage in size.stages}
    places = {name: backends.place(stage.runs, backend) for name, (stage, _) in owners.items()}
    names = {name: backends.choose(places[name], stage.precision) for name, (stage, _) in owners.items()}
    for name, (stage, _) in owners.items():
        backends.require(names[name], stage.precision, options.tuning)
    lost = manifest.lost_engines(folder, contract)  # another backend's are given up: to be copied or made again
    files = {name: file for name, file in contract.files.items() if name not in lost}
    changes: dict[str, Change] = {}
    with ExitStack() as undo:
        for stage, size in owners.values():
            name = names[stage.name]
            manifest.check_files(folder, contract, stage.onnx_files)
            islands = tuple(size.built_with.get("islands", {}).get(stage.name, ()))
            settings = replace(options, precision=stage.precision, islands=islands)
            made, built = backends.backend(name).compile(folder, stage, settings, progress)
            whole = {other: own for other, own in stage.engines.items() if lost.isdisjoint(own)}
            given_up = stage.engines.keys() - whole.keys()
            if made:
                for file in stage.engines.get(name, ()):
                    if file.endswith(manifest.ENGINE):
                        files.pop(file, None)
                whole[name] = made
            else:
                manifest.check_files(folder, contract, stage.engines.get(name, ()))
            changed = replace(stage, backend=name, engines=whole)
            changes[stage.name] = Change(changed, given_up, built if made else None)
            undo.callback(remove, folder, {*made} - {*contract.files})
            files |= {file: manifest.describe(manifest.inside(folder, file)) for file in made}
        undo.pop_all()
    compiled = _compiled(contract, changes)
    for other in contract.sizes:
        compiled = _compiled(compiled.at(other.size), changes)
    return replace(compiled.at(contract.size), files=files)


def _compiled(contract: Manifest, changes: Mapping[str, Change]) -> Manifest:
    """Return the manifest with the changed stages of its size."""
    engines = {name: dict(table) for name, table in contract.built_with.get("engines", {}).items()}
    for stage in contract.stages:
        change = changes[stage.name]
        for other in change.given_up:
            engines.get(other, {}).pop(stage.name, None)
        if change.built is not None:
            engines.setdefault(change.stage.backend, {})[stage.name] = change.built
    stages = tuple(changes[stage.name].stage for stage in contract.stages)
    built_with = {**contract.built_with, **({"engines": engines} if engines else {})}
    proof = {key: contract.parity[key] for key in ("proof",) if key in contract.parity}  # which is of the weights
    return replace(contract, stages=stages, built_with=built_with, parity=proof, batch_invariant=False)


def remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        manifest.inside(folder, name).unlink(missing_ok=True)


def why_unavailable(contract: Manifest, provider: str | None = None) -> str | None:
    """Return why these engines cannot run here; None where they can."""
    for stage in contract.stages:
        reason = backends.backend(stage.backend).why_unavailable(manifest.built(contract, stage))
        if reason := reason or backends.refusal(stage.backend, stage.precision, provider):
            return reason
    return None


def targets(contract: Manifest) -> str:
    """Return what its engines were compiled for, for people."""
    built = manifest.built(contract, contract.step)
    kinds = f" of compute capability {', '.join(built['compute_capabilities'])}" if built else ""
    return f"NVIDIA GPUs{kinds}"


def provider(contract: Manifest) -> str:
    """Return the option of `dit-run` that the bundle's GPU needs, where its backend also runs on CPUs."""
    return "" if manifest.built(contract, contract.step) else " --provider cuda"
