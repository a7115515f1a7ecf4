"""What a bundle's graphs, or one ONNX file, hold: inputs, outputs, ops, weights, dtypes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dit_export.graph import onnxfile
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError


def describe(path: Path) -> dict[str, dict[str, Any]]:
    """Return what each graph holds, by its stage's name, or by the file's."""
    if path.is_dir():
        contract = manifest.read(path)
        return {
            stage.name: {"runs": stage.runs, **_describe(manifest.inside(path, stage.onnx))}
            for stage in contract.stages
        }
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
    return "\n".join(lines)
