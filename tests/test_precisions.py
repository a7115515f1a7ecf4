"""bf16 and fp16 bundles: built, verified at their own tolerances, and red when something overflows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import dit_export.bundle.build
from dit_export.cli import main
from dit_runtime.bundle import manifest


def build(checkpoint: Path, bundle: Path, *options: str) -> int:
    return main(["build", "--checkpoint", str(checkpoint), "-o", str(bundle), "--max-batch", "2", *options])


@pytest.mark.parametrize(("precision", "backend"), [("bf16", "openvino"), ("fp16", "onnxruntime")])
def test_a_bundle_in_a_narrow_precision(narrow, capsys, precision, backend) -> None:
    bundle = narrow(precision, backend)
    contract = manifest.read(bundle)
    found = {name: (graph.precision, graph.backend) for name, graph in contract.graphs.items()}
    assert found["denoiser"] == found["decoder"] == (precision, backend)
    assert found["conditioner"][0] == "fp32"
    checks = json.loads((bundle / "parity.json").read_text())["checks"]
    twins = {check["name"] for check in checks if check["name"].startswith("twin: ")}
    assert ("twin: prediction, rel-L2" in twins) == ("twin: pictures, PSNR in dB" in twins) == (precision == "fp16")
    worst = max(check["value"] for check in checks if check["name"] == "unguided, rel-L2")
    assert worst > 1e-5  # it is not fp32 under another name
    assert main(["verify", str(bundle)]) == 0


def test_a_tensor_near_the_end_of_fp16_stays_wide(meta, tmp_path, capsys, one_thread, monkeypatch) -> None:
    """One channel of an MLP that fp32 carries and fp16 does not: seen by the peaks, and without them by the twin."""
    import torch

    state = torch.load(meta.checkpoint, weights_only=True)["ema"]
    state["blocks.0.mlp.fc1.bias"][0] = 4e5
    state["blocks.0.mlp.fc2.weight"][:, 0] *= 1e-6
    torch.save({"ema": state}, tmp_path / "hot.pt")
    options = ["--heads", "4", "--latents-only", "--backend", "onnxruntime", "--precision", "fp16"]
    with one_thread():
        assert build(tmp_path / "hot.pt", tmp_path / "wide", *options) == 0
        found = manifest.read(tmp_path / "wide").built_with
        (peak,) = {round(peak, -4) for peak in found["wide"]["denoiser"].values()}  # behind the bias, behind the GELU
        assert peak == 4e5 and found["passes"]["denoiser"]["narrow"] == 5 * 2 + 2 - 1 and found["islands"]["denoiser"]
        name = next(iter(found["wide"]["denoiser"]))
        assert name in (tmp_path / "wide" / "report.html").read_text()
        monkeypatch.setattr(dit_export.bundle.build, "wide_of", lambda *_: {})
        assert build(tmp_path / "hot.pt", tmp_path / "narrow", *options) == 1
    checks = json.loads((tmp_path / "narrow.failed" / "parity.json").read_text())["checks"]
    failed = {check["name"]: check for check in checks if not check["passed"]}
    assert {"twin: prediction, rel-L2", "twin: runs that are not finite"} <= failed.keys()  # the CPU's own fp16 is fine
    assert not np.isfinite(float(failed["twin: prediction, rel-L2"]["value"]))
    assert failed["twin: runs that are not finite"]["where"].startswith("step 1 (t = ")


def test_a_precision_without_a_backend(meta, tmp_path, capsys) -> None:
    assert build(meta.checkpoint, tmp_path / "x", "--precision", "bf16", "--backend", "onnxruntime") == 2
    assert "has no bf16" in capsys.readouterr().err
    assert build(meta.checkpoint, tmp_path / "x", "--precision", "fp4") == 2
    assert "known: fp32, bf16, fp16" in capsys.readouterr().err
