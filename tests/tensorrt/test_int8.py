"""An int8 bundle for TensorRT-RTX: its network is fused once and runs once, for grids and for fp16's range."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_export.bundle import assemble
from dit_export.cli import main
from dit_export.precision.measure import Plan
from dit_runtime.bundle import manifest
from dit_runtime.pipeline import Pipeline
from tests.conditionings import save, spec_of


def test_it_is_fused_and_sampled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread) -> None:
    fused, measured, drawn = [], [], []
    fuse, measure, sample = assemble.fuse, assemble.measure, Pipeline.sample

    def measuring(*arguments, **options):
        monkeypatch.setattr(Pipeline, "sample", lambda *args, **more: drawn.append(args) or sample(*args, **more))
        measured.append(measure(*arguments, **options))
        monkeypatch.setattr(Pipeline, "sample", sample)
        return measured[-1]

    monkeypatch.setattr(assemble, "fuse", lambda *arguments: fused.append(arguments) or fuse(*arguments))
    monkeypatch.setattr(assemble, "measure", measuring)
    _, options = save("adaln-zero", tmp_path)
    options += ["--backend", "tensorrt-rtx", "--precision", "int8", "--compute-capability", "8.9", "--max-batch", "2"]
    with one_thread():
        assert main(["build", *options, "-o", str(tmp_path / "bundle")]) == 0
    assert (len(fused), len(measured), len(drawn)) == (1, 1, Plan().pictures // Plan().batch)
    layers = 4 * spec_of("adaln-zero").depth
    (result,) = measured
    assert result.calibration is not None and len(result.calibration.layers) == layers
    assert result.peaks.keys() == {"denoiser"} and len(result.peaks["denoiser"]) > layers

    contract = manifest.read(tmp_path / "bundle")
    assert (contract.step.precision, contract.step.backend) == ("int8", "tensorrt-rtx")
    products = contract.built_with["engines"]["tensorrt-rtx"]["denoiser"]["census"]["products"]
    assert products == {"int8": layers, "fp16": 3 + 2}  # attention, the patches and the last linear
