"""A bundle's stages to engines of one backend: on the target by `dit-run compile`, anywhere by `dit-export build`."""

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


def compile_stages(folder: Path, contract: Manifest, backend: str, options: Options, progress: Progress) -> Manifest:
    """Return the manifest with this backend for every stage, and with the engines that it made; write no manifest.

    What the new engines replace is named no more, and still there; engines that are missing or cut short, of whichever
    backend, are not named either. Nothing was verified yet.
    """
    names = {stage.name: backends.choose(backend, stage.precision) for stage in contract.stages}
    for stage in contract.stages:
        backends.require(names[stage.name], stage.precision, options.tuning)
    lost = manifest.lost_engines(folder, contract)  # another backend's are given up: to be copied or made again
    stages, files = [], {name: file for name, file in contract.files.items() if name not in lost}
    engines = dict(contract.built_with.get("engines", {}))
    with ExitStack() as undo:
        for stage in contract.stages:
            name = names[stage.name]
            manifest.check_files(folder, contract, stage.onnx_files)
            islands = tuple(contract.built_with.get("islands", {}).get(stage.name, ()))
            settings = replace(options, precision=stage.precision, islands=islands)
            made, built = backends.backend(name).compile(folder, stage, settings, progress)
            whole = {other: own for other, own in stage.engines.items() if lost.isdisjoint(own)}
            for other in stage.engines.keys() - whole.keys():
                engines[other] = {key: how for key, how in engines.get(other, {}).items() if key != stage.name}
            if made:
                for file in stage.engines.get(name, ()):
                    if file.endswith(manifest.ENGINE):
                        files.pop(file, None)
                engines[name] = {**engines.get(name, {}), stage.name: built}
                whole[name] = made
            else:
                manifest.check_files(folder, contract, stage.engines.get(name, ()))
            stages.append(replace(stage, backend=name, engines=whole))
            undo.callback(remove, folder, {*made} - {*contract.files})
            files |= {file: manifest.describe(manifest.inside(folder, file)) for file in made}
        undo.pop_all()
    built_with = {**contract.built_with, **({"engines": engines} if engines else {})}
    proof = {key: contract.parity[key] for key in ("proof",) if key in contract.parity}  # which is of the weights
    changed = replace(contract, stages=tuple(stages), files=files, built_with=built_with, parity=proof)
    return replace(changed, batch_invariant=False)


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
