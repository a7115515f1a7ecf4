"""bf16 and fp16 bundles: built, verified at their own tolerances, and red when something overflows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import dit_export.bundle.assemble
from dit_export.cli import main
from dit_export.graph import onnxfile
from dit_runtime import Pipeline, UsageError
from dit_runtime.bundle import manifest
from tests.precision.conftest import CHANNELS, TOKENS, outlying_pixart


def build(checkpoint: Path, bundle: Path, *options: str) -> int:
    return main(["build", "--checkpoint", str(checkpoint), "-o", str(bundle), "--max-batch", "2", *options])


@pytest.mark.parametrize(("precision", "backend"), [("bf16", "openvino"), ("fp16", "onnxruntime")])
def test_a_bundle_in_a_narrow_precision(narrow, capsys, precision, backend) -> None:
    bundle = narrow(precision, backend)
    contract = manifest.read(bundle)
    precisions = {stage.name: (stage.precision, stage.backend) for stage in contract.stages}
    assert precisions["denoiser"] == precisions["decoder"] == (precision, backend)
    assert precisions["conditioner"][0] == "fp32"
    checks = json.loads((bundle / "parity.json").read_text())["checks"]
    twins = {check["name"] for check in checks if check["name"].startswith("twin: ")}
    wanted = {"twin: denoiser: prediction, rel-L2", "twin: run: pictures, PSNR in dB"}
    assert twins & wanted == (wanted if precision == "fp16" else set())
    worst = max(check["value"] for check in checks if check["name"] == "denoiser: unguided, rel-L2")
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
        facts = manifest.read(tmp_path / "wide").built_with
        (peak,) = {round(peak, -4) for peak in facts["wide"]["denoiser"].values()}  # behind the bias, behind the GELU
        assert (
            peak == 4e5
            and facts["passes"]["denoiser"]["cast_to_half"] == 5 * 2 + 2 - 1
            and facts["islands"]["denoiser"]
        )
        name = next(iter(facts["wide"]["denoiser"]))
        assert name in (tmp_path / "wide" / "report.html").read_text()
        monkeypatch.setattr(dit_export.bundle.assemble, "find_overflows", lambda *_: {})
        assert build(tmp_path / "hot.pt", tmp_path / "narrow", *options) == 1
    checks = json.loads((tmp_path / "narrow.failed" / "parity.json").read_text())["checks"]
    failed = {check["name"]: check for check in checks if not check["passed"]}
    prediction = "twin: denoiser: prediction, rel-L2"
    (finite,) = [check for name, check in failed.items() if name.endswith("runs that are not finite")]
    assert prediction in failed and not np.isfinite(float(failed[prediction]["value"]))  # the CPU's own fp16 is fine
    assert finite["name"].startswith("twin: ") and finite["where"].startswith("step 1 (t = ")


@pytest.mark.parametrize(("precision", "backend"), [("int8", "openvino"), ("fp16", "onnxruntime")])
def test_a_network_of_diffusers_in_a_narrow_precision(tmp_path, capsys, one_thread, precision, backend) -> None:
    """A PixArt with outlier channels: linears for q, k and v of their own, and a mask with one row for all queries."""
    outlying_pixart().save_pretrained(tmp_path / "pixart")
    options = ["--latents-only", "--caption-tokens", str(TOKENS), "--precision", precision, "--backend", backend]
    with one_thread():
        assert build(tmp_path / "pixart", tmp_path / "bundle", *options) == 0
    contract = manifest.read(tmp_path / "bundle")
    assert (contract.step.precision, contract.step.backend) == (precision, backend)
    assert contract.port("captions").shape == (TOKENS, CHANNELS)
    checks = json.loads((tmp_path / "bundle" / "parity.json").read_text())["checks"]
    unguided = max(check["value"] for check in checks if check["name"] == "denoiser: unguided, rel-L2")
    counts = contract.built_with["passes"]["denoiser"]
    if precision == "int8":
        assert 1e-4 < unguided <= 0.035  # as in tests/precision/test_accuracy.py
        assert counts["quantize"] == 8 * 2 and counts["quantize_attention"] == 2
        assert "int8: 9" in capsys.readouterr().out
        census = onnxfile.census(onnxfile.load(tmp_path / "bundle" / "denoiser.openvino.onnx"))
        assert census["QuantizeLinear"] == 8 * 2 + 2 * 2
    else:
        assert 1e-5 < unguided <= 0.01
        assert counts["cast_to_half"] == 8 * 2 + 2 * 2 + 2 and not contract.built_with["islands"]
        twins = {check["name"] for check in checks if check["name"].startswith("twin: ")}
        assert "twin: denoiser: prediction, rel-L2" in twins
    assert main(["verify", str(tmp_path / "bundle")]) == 0


def test_bf16_of_onnxruntime_is_for_gpus(meta, tmp_path, capsys, one_thread) -> None:
    """Its CPU provider has no kernels of it: the twin verifies the build, and only provider cuda opens it."""
    bundle, options = tmp_path / "bundle", ["--heads", "4", "--latents-only"]
    with one_thread():
        assert build(meta.checkpoint, bundle, *options, "--backend", "onnxruntime", "--precision", "bf16") == 0
    said = capsys.readouterr().out
    assert "does not run here: bf16 has no kernels in ONNX Runtime's CPU provider; use provider cuda" in said
    assert f"verify {bundle} --provider cuda" in said
    contract = manifest.read(bundle)
    assert (contract.step.precision, contract.step.backend, contract.step.engines) == ("bf16", "onnxruntime", {})
    checks = json.loads((bundle / "parity.json").read_text())["checks"]
    assert {check["name"].split(": ")[0] for check in checks} == {"proof", "twin"}
    with pytest.raises(UsageError, match="bf16 has no kernels in ONNX Runtime's CPU provider; use provider cuda"):
        Pipeline.load(bundle)


def test_a_precision_without_a_backend(meta, tmp_path, capsys) -> None:
    assert build(meta.checkpoint, tmp_path / "x", "--precision", "fp8", "--backend", "onnxruntime") == 2
    assert "has no fp8" in capsys.readouterr().err
    assert build(meta.checkpoint, tmp_path / "x", "--precision", "fp4") == 2
    assert "known: fp32, bf16, fp16" in capsys.readouterr().err
