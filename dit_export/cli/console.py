"""Output of the commands: verdicts, where a bundle is, and the next command."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dit_runtime.bundle import manifest
from dit_runtime.bundle.compiling import provider, targets, why_unavailable
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.bundle.records import LABELS
from dit_runtime.cli import report

if TYPE_CHECKING:
    from dit_export.verify.check import Built


def report_built(built: Built, as_json: bool) -> int:
    """Print the verdict of a build and the next command; return the exit code."""
    from dit_export.verify.metrics import kept_in_float, text_in_fp32

    code = report_checks(built, as_json)
    out = sys.stderr if as_json else sys.stdout
    if code:
        print(f"the bundle that failed: {built.folder}" + (f"\n{built.advice}" if built.advice else ""), file=out)
        return code
    contract = manifest.read(built.folder)
    if share := contract.built_with.get("quantized"):
        print(f"{contract.step.precision}: {share:.0%} of the weights that every step multiplies with", file=out)
    if cost := contract.built_with.get("kept_float"):
        print(*kept_in_float(cost, contract.step.precision), sep="\n", file=out)
    if line := text_in_fp32(contract):
        print(line, file=out)
    if layers := contract.built_with.get("convolutions"):
        count, kept = layers["quantized"], f"; in float: {', '.join(layers['kept'])}" if layers["kept"] else ""
        near = "" if layers["psnr"] is None else f", {layers['psnr']} dB to fp32"
        print(f"decoder: {count} convolutions in int8{near}{kept}", file=out)
    print(f"bundle: {built.folder}\nsample: {sample_command(built.folder, contract)}", file=out)
    if reason := why_unavailable(contract):
        print(
            f"verified through its rounding twins, for it does not run here: {reason}\n"
            f"it runs on {targets(contract)}; there, prove it: {dit_run()} verify {built.folder}{provider(contract)}",
            file=out,
        )
    return code


def report_checks(built: Built, as_json: bool) -> int:
    """Print the checks, and a warning where parity on these weights proves little; return the exit code."""
    from dit_export.verify.metrics import insensitive

    code = report(built.checks, as_json)
    if not built.sensitive:
        print(insensitive(built.folder, built.proof), file=sys.stderr)
    return code


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
