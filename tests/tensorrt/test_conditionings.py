"""Every way of conditioning compiles, typed: its cross-attention, its mask and what is computed of captions too."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_export.graph import onnxfile, trace
from dit_export.networks.dit import DiT
from dit_export.networks.spec import signatures
from dit_export.passes import expected_counts, fuse
from dit_export.precision.half import narrow
from dit_runtime.backends import Options, backend
from dit_runtime.bundle.manifest import Graph
from dit_runtime.progress import Progress
from tests.conditionings import WAYS, spec_of


@pytest.mark.parametrize("way", [way for way in WAYS if way != "adaln-zero"])
def test_it_compiles_in_fp16(tmp_path: Path, way: str) -> None:
    spec = spec_of(way)
    trace.export_dit(DiT(spec).eval()).save(tmp_path / "dit.onnx", external_data=True)
    fused = fuse(onnxfile.load(tmp_path / "dit.onnx"), spec)
    products = narrow(fused.denoiser, "fp16")
    assert products == expected_counts(spec)["narrow"]
    parts = {"denoiser": (fused.denoiser, "fp16"), "context": (fused.context, "fp32")}
    for name, (graph, precision) in parts.items():
        if graph is not None:
            onnxfile.save(graph, tmp_path / f"{name}.onnx")
            contract = Graph(f"{name}.onnx", *signatures(spec)[name], max_batch=2, precision=precision)
            (tmp_path / f"{name}.onnx.data").touch()
            made = backend("tensorrt-rtx").compile(tmp_path, contract, Options(precision=precision), Progress())
            assert made.built["census"]["products"].keys() == {precision}
            assert name != "denoiser" or made.built["census"]["products"] == {"fp16": products}
