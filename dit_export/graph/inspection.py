"""Contents of a bundle's graphs or of one ONNX file: inputs, outputs, ops, weights, dtypes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_export.graph import onnxfile
from dit_runtime.bundle import manifest
from dit_runtime.errors import BundleError, UsageError


def describe(path: Path) -> dict[str, dict[str, Any]]:
    """Return what each graph holds, by its stage's name, or by the file's."""
    if path.is_dir():
        contract = manifest.read(path)
        entries = {
            stage.name: {"runs": stage.runs, **_describe(manifest.inside(path, stage.onnx))}
            for size in contract.each_size
            for stage in size.stages
        }
        for size in contract.each_size:
            if "cut" in size.built_with:
                entries[size.step.name]["cut"] = size.built_with["cut"]
        return entries
    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected a bundle or an ONNX model")
    return {path.name: _describe(path)}


def _describe(path: Path) -> dict[str, Any]:
    graph = onnxfile.load(path)
    dtypes: Counter[str] = Counter()
    for tensor in onnxfile.constants(graph):
        dtypes[str(tensor.values.dtype)] += tensor.values.nbytes
    return {
        "opset": graph.opset,
        "inputs": {tensor.name: [str(tensor.dtype), *tensor.shape] for tensor in graph.inputs},
        "outputs": {tensor.name: [str(tensor.dtype), *tensor.shape] for tensor in graph.outputs},
        "nodes": len(graph.nodes),
        "ops": onnxfile.census(graph),
        "weight_bytes": dict(dtypes),
    }


def table(described: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, entry in described.items():
        weights = ", ".join(f"{size / 1e6:.1f} MB {dtype}" for dtype, size in entry["weight_bytes"].items())
        runs = f"runs {entry['runs']}, " if "runs" in entry else ""
        lines.append(f"{name}: {runs}opset {entry['opset']}, {entry['nodes']} nodes, weights {weights or 'none'}")
        for direction in ("inputs", "outputs"):
            for tensor, (dtype, *shape) in entry[direction].items():
                lines.append(f"  {direction[:-1]:<7} {tensor} {dtype} {shape}")
        lines.append("  ops     " + ", ".join(f"{op} {count}" for op, count in entry["ops"].items()))
        lines += [f"  {line}" for line in cut_lines(entry["cut"])] if "cut" in entry else []
    return "\n".join(lines)


def cut_lines(cut: Mapping[str, Any]) -> list[str]:
    """Describe the summary of a cut: what left the loop, what crosses, and what is cheaper in the loop."""
    try:
        lines = [
            f"left the loop: {cut['weights'] / 1e6:.1f} MB of weights",
            f"crosses: {cut['crossing']} tensors, {cut['bytes'] / 1e6:.1f} MB a run",
        ]
        if cut["direct"]:
            lines.append(f"read by the loop as they are: {', '.join(cut['direct'])}")
        if cut["priced_out"]:
            size = f"{cut['priced_out_weights'] / 1e6:.1f} MB of weights"
            lines.append(f"priced out: {cut['priced_out']} ops with {size} are cheaper in the loop")
            lines.append(f"priced out, the heaviest: {', '.join(cut['heaviest'])}")
    except (KeyError, TypeError) as error:
        raise BundleError(f"{manifest.NAME}: built_with says {cut!r} of the cut: {error}; rebuild the bundle") from None
    return lines
