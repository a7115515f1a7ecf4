"""Output of the commands: verdicts, where a bundle is, and the next command."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_export.recipe import Recipe
from dit_runtime import advice
from dit_runtime.bundle import manifest
from dit_runtime.bundle.compiling import provider, targets, why_unavailable
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.bundle.records import LABELS
from dit_runtime.console import answer, note
from dit_runtime.verify import table as checks

if TYPE_CHECKING:
    from dit_export.verify.check import Built

Lines = Sequence[str]


def report_built(
    options: argparse.Namespace, built: Built, recipe: Recipe, more: Mapping[str, Any] | None = None, lines: Lines = ()
) -> int:
    """Print the verdict of a build and the next command; return the exit code.

    `more` goes into the JSON, and `lines` are printed to people.
    """
    warn_insensitive(options, built)
    table: dict[str, Any] = {"passed": built.passed, "bundle": str(built.folder), **(more or {})}
    table["checks"] = [figure.to_dict() for figure in built.checks]
    if not built.passed:
        table["next"] = [recipe.command(**changes) for changes in built.changes]
        failed = [figure for figure in built.checks if not figure.passed]
        rest = ["FAILED: this bundle does not draw PyTorch's pictures", f"the bundle that failed: {built.folder}"]
        rest += [built.advice] if built.advice else []
        rest += [f"its report: {built.folder}/report.html", *advice.lines(table["next"])]
        answer(options, table, "\n".join([checks(built.checks), *rest]), "\n".join([checks(failed), *rest]))
        return 1
    contract = manifest.read(built.folder)
    table["next"] = [sample_command(built.folder, contract)]
    said = [checks(built.checks), "verified", *_about(contract), f"bundle: {built.folder}"]
    said.append(f"sample: {table['next'][0]}")
    if reason := why_unavailable(contract):
        said += [
            f"verified through its rounding twins, for it does not run here: {reason}",
            f"it runs on {targets(contract)}; there, prove it: {dit_run()} verify {built.folder}{provider(contract)}",
        ]
    answer(options, table, "\n".join([*said, *lines]), brief=str(built.folder))
    return 0


def _about(contract: Manifest) -> Iterator[str]:
    """Say what of the network is in the bundle's precision, and what stayed in float."""
    from dit_export.verify.metrics import kept_in_float, text_in_fp32

    if share := contract.built_with.get("quantized"):
        yield f"{contract.step.precision}: {share:.0%} of the weights that every step multiplies with"
    if cost := contract.built_with.get("kept_float"):
        yield from kept_in_float(cost, contract.step.precision)
    if line := text_in_fp32(contract):
        yield line
    if layers := contract.built_with.get("convolutions"):
        count, in_float = layers["quantized"], f"; in float: {', '.join(layers['kept'])}" if layers["kept"] else ""
        near = "" if layers["psnr"] is None else f", {layers['psnr']} dB to fp32"
        yield f"decoder: {count} convolutions in int8{near}{in_float}"


def verdict(options: argparse.Namespace, built: Built) -> list[str]:
    """Return the checks of one of several builds, and warn where they prove little."""
    warn_insensitive(options, built)
    return [checks(built.checks), "verified" if built.passed else f"FAILED: {built.folder}/report.html shows where"]


def warn_insensitive(options: argparse.Namespace, built: Built) -> None:
    from dit_export.verify.metrics import insensitive

    if not built.sensitive:
        note(options, insensitive(built.folder, built.proof))


def sample_command(folder: Path, contract: Manifest) -> str:
    """Return a command that draws from the bundle."""
    parts = [dit_run(), "sample", str(folder)]
    if contract.classes:
        parts.append(f"--labels {contract.classes // 4} {3 * contract.classes // 4}")
    if contract.prompts:
        parts.append('--prompt "a photo of a cat"')
    named = {contract.guidance.port, LABELS if contract.classes else ""}
    if contract.picture is not None and contract.start is not None:
        parts.append("--image SMALL.png")
        named.add(contract.picture.name)
    arrays = [port.name for port in contract.ports_beside_prompts if port.name not in named]
    if arrays:
        parts.append("--condition CONDITION.npz")
    if contract.mixes_guidance and {*arrays, LABELS} & {*contract.without_null}:
        parts.append("--negative-condition NEGATIVE.npz")
    return " ".join(parts + ([] if contract.end else ["-o latents.npy"]))


def dit_run() -> str:
    """Return `dit-run` as the user can type it: `make` runs us from an environment that is not activated."""
    beside = Path(sys.executable).with_name("dit-run")
    return "dit-run" if shutil.which("dit-run") else os.path.relpath(beside)
