"""The gate on bf16 and INT8, where a sound block is a little off too."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from dit_export.checkpoints import load_source
from dit_export.cli import main
from dit_export.verify.check import compare
from dit_export.verify.parity import proof
from dit_runtime.bundle import manifest
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.verify import load_reference
from tests.conftest import DIFFUSERS_DEPTH, HEADS, HIDDEN, META_CLASSES
from tests.tamper import double_scale, seal, swap_vectors, weight


def test_a_swap_in_a_narrow_precision(shared_embedders, tmp_path, regress, one_thread):
    """bf16 on OpenVINO, where every block is a little off: beside the fp32 bundle the broken one stands out."""
    bundle = tmp_path / "bf16"
    command = ["build", "--checkpoint", str(shared_embedders.checkpoint), "--precision", "bf16", "-o", str(bundle)]
    with one_thread():
        assert main(command) == 0
    assert regress(bundle, "--baseline", str(tmp_path / "b.json"), "--update-baseline").code == 0
    assert regress(bundle, "--baseline", str(tmp_path / "b.json")).code == 0
    swap_vectors(bundle, 2, "denoiser.openvino.onnx")
    seal(bundle)
    verdict = regress(bundle, "--baseline", str(tmp_path / "b.json"), "--against", str(shared_embedders.bundle))
    assert (verdict.code, verdict.first["stage"]) == (1, "denoiser")
    assert verdict.located[0].startswith(
        f"denoiser: first moved: blocks.1.attn (residual sum 3 of {2 * DIFFUSERS_DEPTH})"
    )
    assert ("decoder", "PyTorch's latents, PSNR in dB") not in verdict.failed


@pytest.fixture(scope="module")
def int8(meta, tmp_path_factory, one_thread) -> Path:
    """The small bundle in INT8: smoothing's divisors are in its conditioner, whose vectors so are not PyTorch's."""
    folder = tmp_path_factory.mktemp("int8")
    options = ["--heads", str(HEADS), "--latents-only", "--max-batch", "4", "--precision", "int8"]
    with one_thread():
        command = ["build", "--checkpoint", str(meta.checkpoint), "--backend", "openvino", *options]
        assert main([*command, "-o", str(folder / "bundle")]) == 0
    return folder / "bundle"


@pytest.mark.parametrize("truth", ["PyTorch", "fp32", "int8"])
def test_int8_is_localized_through_its_smoothing(meta, int8, regress, tmp_path, truth):
    """A scale of one layer's weights doubled in Q/DQ, a wrong null row, and nothing wrong at all."""
    base, against = tmp_path / "int8.json", {"PyTorch": [], "fp32": ["--against", str(meta.bundle)]}
    options = ["--baseline", str(base), *against.get(truth, ["--against", str(int8)])]
    assert regress(int8, "--baseline", str(base), "--update-baseline").code == 0
    assert regress(int8, *options).code == 0

    bundle = Path(shutil.copytree(int8, tmp_path / "scale"))
    double_scale(bundle, "blocks.0.mlp.fc2", "denoiser.openvino.onnx")
    seal(bundle)
    verdict = regress(bundle, *options)
    assert (verdict.code, verdict.first["stage"], verdict.first["step"]) == (1, "denoiser", 1)
    (sentence,) = verdict.located
    assert sentence.startswith("denoiser: first moved: blocks.0.mlp (residual sum 2 of 4)")

    bundle = Path(shutil.copytree(int8, tmp_path / "null"))
    table = weight(bundle, "conditioner", (META_CLASSES + 1, HIDDEN))
    table[META_CLASSES] = table[5]
    table.flush()
    seal(bundle)
    verdict = regress(bundle, *options)
    assert (verdict.code, verdict.first["stage"], verdict.first["metric"]) == (
        1,
        "conditioner",
        "fingerprint of the null, rel-L2",
    )
    (sentence,) = verdict.located
    assert "for the null (labels 12)" in sentence


def test_the_proof_is_not_met_by_rounding(int8, tmp_path):
    """int8 alone is further from PyTorch than the proof asks for; what hears no timestep still fails it."""
    bundle = Path(shutil.copytree(int8, tmp_path / "deaf"))
    weight(bundle, "conditioner", (HIDDEN, HIDDEN))[:] = 0  # the last linear of the timestep's embedder
    seal(bundle)
    with Pipeline.load(bundle, threads=1) as pipe:
        checks = {figure.name: figure for figure in proof(pipe, load_reference(bundle, pipe.manifest))}
    moved = checks.pop("proof: t moved by 5 %, rel-L2")
    assert moved.value == 0 and not moved.passed
    assert len(checks) == 2 and all(check.passed for check in checks.values())


def test_what_a_condition_changes_is_a_gate(int8, tmp_path):
    """Every label has one embedding: however far int8 is from PyTorch, nothing of a condition is left.

    The weights are a user's, and the engine that removed the condition is no proof that they are insensitive.
    """
    name = "denoiser: what a condition changes in int8, share of PyTorch's"
    loaded = load_source(manifest.read(int8), int8)
    assert loaded.source["kind"] != "synthetic"
    bundle = Path(shutil.copytree(int8, tmp_path / "unconditional"))
    for changed, share in ((False, 1.0), (True, 0.0)):
        if changed:
            table = weight(bundle, "conditioner", (META_CLASSES + 1, HIDDEN))
            table[:] = table[0]
            seal(bundle)
        with Pipeline.load(bundle, threads=1) as pipe:
            built = compare({"": pipe}, load_reference(bundle, pipe.manifest), loaded, None, Progress(io.StringIO()))
        checks = {figure.name: figure for figure in built.checks}
        assert abs(checks[name].value - share) < 0.1 and checks[name].passed == (not changed)


def test_a_stale_conditioner_in_int8(int8, later, regress, tmp_path):
    """The denoiser, which reads PyTorch's tensors divided as the reference says, is right."""
    bundle = Path(shutil.copytree(int8, tmp_path / "stale"))
    for name in ("conditioner.onnx", "conditioner.onnx.data"):
        shutil.copyfile(later.bundle / name, bundle / name)
    seal(bundle)
    verdict = regress(bundle)
    assert (verdict.code, verdict.first["where"]) == (1, "every condition: stale, or of other weights")
    (sentence,) = verdict.located
    assert sentence.startswith("conditioner: ")
