"""The commands to try when the gate fails. Each one is named only where it can mend the failure or show more of it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from dit_export.recipe import Recipe, wider
from dit_export.verify.metrics import PROOF, SAMPLER
from dit_runtime.advice import REPORT

if TYPE_CHECKING:
    from dit_export.verify.gate import Result

UNRELATED = (PROOF, SAMPLER, "reference")  # stages of figures that another precision does not change


def after_gate(options: argparse.Namespace, result: Result) -> list[str]:
    """Return the next commands: show the failure, accept a wanted change, or build in another precision."""
    if result.passed:
        return []
    commands = [] if options.report else [_again(options, "--report", REPORT)]
    if options.baseline and not options.update_baseline and result.sound:
        commands.append(_again(options, "--update-baseline"))
    if not result.sound:
        commands += _builds(result)
    return commands


def _again(options: argparse.Namespace, *more: str) -> str:
    """Return the command that failed with more options."""
    words = ["dit-export", "verify" if options.weights else "regress", str(options.bundle)]
    names = ("size", "baseline", "against", "features", "real", "samples", "count", "threads", "provider")
    for name in names:
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", str(value)]
    words += ["--low-memory"] if options.low_memory else []
    return shlex.join([*words, *more])


def _builds(result: Result) -> Iterator[str]:
    """Yield the build in each wider precision of its backend, where the precision is what can be at fault."""
    contract = result.contract
    end, step = contract.end, contract.step
    failed = {figure.stage.removeprefix("twin: ") for figure in result.checks if not figure.passed} - {*UNRELATED}
    source = contract.source.get("recipe", {})
    if not failed or not isinstance(source, dict) or not source.keys() <= {field.name for field in fields(Recipe)}:
        return
    recipe = Recipe(**source)
    if not recipe.names_weights:  # the network was a caller's own
        return
    if end is not None and end.precision == "int8" and failed == {end.name}:
        yield recipe.command(keep_float=[*(recipe.keep_float or []), "decoder"])
    if step.precision != "fp32":
        yield from (recipe.command(**change) for change in wider(step.backend, step.precision))
