"""The commands to try when engines fail their gate. Each is named only where it can mend or narrow the failure."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence

from dit_runtime import backends
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.verify import Figure

REPORT = "report.html"


def lines(commands: Sequence[str]) -> list[str]:
    return [f"next: {command}" for command in commands]


def after_verify(options: argparse.Namespace, contract: Manifest, figures: Sequence[Figure]) -> list[str]:
    """Return what tells an engine that is wrong from a provider or a compiler that is, and then what shows more."""
    failed = {figure.stage for figure in figures if not figure.passed}
    return [*_other_engines(options, contract, failed), show(options)]


def _other_engines(options: argparse.Namespace, contract: Manifest, failed: set[str]) -> Iterator[str]:
    bundle = shlex.quote(str(options.bundle))
    # What the step stage does shows in the run and in each stage after it.
    stages = [stage for stage in contract.stages if stage.name in failed] or list(contract.stages)
    if "sampler" in failed:  # computed without an engine
        return
    if options.provider not in (None, "cpu") and any(stage.backend == "onnxruntime" for stage in stages):
        yield f"dit-run verify {bundle} --provider cpu"
    if any(manifest.built(contract, stage) for stage in stages):
        yield f"dit-run compile {bundle} --backend {contract.step.backend}"


def show(options: argparse.Namespace) -> str:
    """Return the command that shows each figure and picture; it needs dit-export, and no weights."""
    provider = f" --provider {shlex.quote(options.provider)}" if options.provider else ""
    return f"dit-export regress {shlex.quote(str(options.bundle))}{provider} --report {REPORT}"


def after_compile(options: argparse.Namespace, compiled: Manifest) -> list[str]:
    """Return the compilation for another backend that is installed; the bundle itself is as it was before."""
    step, bundle = compiled.step, shlex.quote(str(options.bundle))
    for name in reversed(backends.BACKENDS):  # the one that runs everywhere first
        other = backends.backend(name)
        runs = backends.versions()[name] and not other.why_unavailable()
        if name != step.backend and runs and step.precision in other.PRECISIONS:
            return [f"dit-run compile {bundle} --backend {name}"]
    return []
