"""A bundle in a few lines, for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_runtime import backends
from dit_runtime.bundle import manifest, signature
from dit_runtime.bundle.records import MEASURED, Manifest, Port, Prompt

PER = {
    "prompt": "once a prompt",
    "condition": "once a condition",
    "time": "once a timestep",
    "time+condition": "once a timestep and condition",
    "start": "once a picture to start from",
    "step": "every step",
    "update": "every step, on a GPU",
    "end": "once a picture",
}


def summary(folder: Path, contract: Manifest) -> str:
    model, sampler, state = contract.model, contract.process.sampler, contract.state
    names = f"{len(contract.labels)} classes with names" if contract.labels else f"{contract.classes} classes"
    lines = [
        f"{folder}",
        f"model      {model.get('name')} at {model.get('resolution')} px" + (f", {names}" if contract.classes else ""),
        f"sampling   {sampler.solver} on {contract.process.prediction}, {sampler.steps} steps, {_guidance(contract)}",
    ]
    if contract.sizes:
        lines.append(f"sizes      {', '.join(contract.size_names)}; what follows is of the first")
    lines += [f"port       {_port(port, contract)}" for port in (state, contract.time, *contract.conditions)]
    lines += [f"prompt     {_prompt(prompt)}" for prompt in contract.prompts]
    for stage in contract.stages:
        size = sum(contract.files[file].size for file in stage.files)
        reads = ", ".join(spec.name for spec in stage.reads)
        precision = backends.computed(stage.backend, stage.precision)
        what = f"{precision} on {stage.backend}, {size / 1e6:.1f} MB, {PER[stage.runs]}, reads {reads}"
        lines.append(f"{stage.name:<10} {what}")
    lines += [f"preset     {name}: {_preset(preset)}" for name, preset in contract.presets.items()]
    parity = contract.parity
    outcome = ("passed" if parity["passed"] else "FAILED") if "passed" in parity else "not verified"
    lines.append(f"parity     {outcome}, proof: {parity.get('proof', 'none')}")
    depends = "does not depend" if contract.batch_invariant else "may depend"
    lines.append(f"batch      a sample {depends} on the others of its batch")
    origin = [f"{key} {contract.source[key]}" for key in ("kind", "path", "hub", "seed") if key in contract.source]
    lines.append(f"weights    {', '.join(origin)}")
    lines.append(f"signed     {signature.describe(folder, manifest.read_content(folder))[1]}")
    return "\n".join(lines)


def _guidance(contract: Manifest) -> str:
    guidance = contract.guidance
    if guidance.port:
        return f"guidance {guidance.default:g} as {guidance.port}"
    if not contract.mixes_guidance:
        return "no guidance"
    return f"guidance {guidance.default:g} on {guidance.channels} of {contract.state.shape[0]} channels"


def _preset(preset: Mapping[str, Any]) -> str:
    """Return the fields of a preset and the figures for which it was accepted."""
    fields = ", ".join(f"{name} {_shown(value)}" for name, value in preset.items() if name != MEASURED)
    figures = [
        f"{name} {_shown(value)}" for name, value in preset.get(MEASURED, {}).items() if isinstance(value, int | float)
    ]
    return fields + (f"; measured: {', '.join(figures)}" if figures else "")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _prompt(prompt: Prompt) -> str:
    words = f"{prompt.ids}: up to {prompt.tokens} tokens by {prompt.tokenizer}"
    return words + (f", in {prompt.template!r}" if prompt.template != "{}" else "")


def _port(port: Port, contract: Manifest) -> str:
    words = [port.role, port.dtype, " x ".join(map(str, port.shape)) or "one value"]
    if port.size:
        words.append(f"0 to {port.size - 1}")
    if port.masks:
        words.append(f"marks the tokens of {port.masks}")
    if port.picture:
        words.append("the latents of a picture")
    if port.name in contract.null:
        words.append(f"guidance leads away from {contract.null[port.name]}")
    return f"{port.name}: {', '.join(words)}"
