"""Text encoders in bundles of every precision: how they are stored, and what happens where a type is too small."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

from dit_export.bundle import assemble
from dit_export.bundle import build as building
from dit_export.recipe import Recipe
from dit_export.verify import text
from dit_export.verify.check import Built
from dit_export.verify.report import NAME as REPORT
from dit_runtime import Pipeline, backends
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.progress import Progress
from dit_runtime.verify import TOLERANCES
from tests.families import tiny
from tests.networks.tiny import pixart

TOKENS = 24
FAR = 1e5  # beyond fp16's end, for a T5's residual branch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A pipeline whose T5 has branches beyond fp16's end, as T5-XXL does; the final norm brings them back."""
    tokenizer = tiny.t5_tokenizer()
    encoder = tiny.t5(tokenizer)
    encoder.encoder.block[1].layer[1].DenseReluDense.wo.weight *= FAR
    pipeline = PixArtAlphaPipeline(
        transformer=pixart(out_channels=8, caption_channels=64),
        scheduler=DPMSolverMultistepScheduler(),
        vae=tiny.vae(4, shift_factor=None, scaling_factor=0.18215),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    folder = tmp_path_factory.mktemp("text") / "checkpoint"
    pipeline.save_pretrained(folder)
    return folder


def build(checkpoint: Path, output: Path, backend: str, precision: str, **recipe) -> tuple[Built, Manifest, str]:
    out = io.StringIO()
    fields = {"checkpoint": str(checkpoint), "output": str(output), "backend": backend, "precision": precision}
    built = building.build(
        Recipe(**fields, caption_tokens=TOKENS, latents_only=True, max_batch=2, **recipe), Progress(out)
    )
    assert built.passed, [figure for figure in built.checks if not figure.passed]
    return built, manifest.read(built.folder), out.getvalue()


def text_size(contract: Manifest) -> int:
    return contract.files["prompt.onnx.data"].size


def errors(built: Built, prefix: str = "") -> list[float]:
    return [
        figure.value for figure in built.checks if figure.stage == f"{prefix}prompt" and "captions at" in figure.metric
    ]


@pytest.mark.builds
def test_sixteen_bits_on_a_cpu(checkpoint, tmp_path, monkeypatch) -> None:
    """The weights are half as large, and computed in fp32 where the least memory is needed."""
    built, contract, _ = build(checkpoint, tmp_path / "bf16", "openvino", "bf16")
    prompt = contract.prompt
    assert (prompt.backend, prompt.precision, contract.step.backend) == ("onnxruntime", "fp32", "openvino")
    weights = sum(p.numel() for p in tiny.t5(tiny.t5_tokenizer()).parameters())
    assert 2 * weights <= text_size(contract) < 2.2 * weights
    assert 1e-5 < max(errors(built)) < TOLERANCES["bf16"].prediction
    with Pipeline.load(built.folder, threads=1) as pipe:
        expected = pipe.engines.encode(pipe.engines.tokenizers(["a cat"]))["captions"]
    monkeypatch.setattr(backends.backend("onnxruntime"), "version", lambda: None)
    with Pipeline.load(built.folder, threads=1) as pipe:  # where OpenVINO is alone
        alone = pipe.engines.encode(pipe.engines.tokenizers(["a cat"]))["captions"]
        assert "ov" in type(pipe.engines.open(prompt)).__module__.split(".")[-1]
    assert abs(alone - expected).max() < 1e-3


@pytest.mark.slow
def test_what_overflows_stays_fp32(checkpoint, tmp_path) -> None:
    built, contract, _ = build(checkpoint, tmp_path / "fp16", "onnxruntime", "fp16")
    assert contract.prompt.precision == "fp16" and "text_in_fp32" not in contract.built_with
    wide = contract.built_with["wide"]["prompt"]
    assert any(65504 < peak < 1e9 for peak in wide.values()), wide
    assert contract.built_with["islands"]["prompt"] and contract.built_with["passes"]["prompt"]["cast_to_half"] > 4
    limit = TOLERANCES["fp16"].prediction
    assert 0 < max(errors(built)) < limit and 1e-4 < max(errors(built, "twin: ")) < limit


@pytest.mark.slow
def test_a_gate_that_fails_leaves_fp32(checkpoint, tmp_path, monkeypatch) -> None:
    """The measured ranges are withheld, so that the encoders overflow in fp16."""
    monkeypatch.setattr(assemble, "measure_prompts", lambda *_: {})
    built, contract, said = build(checkpoint, tmp_path / "fp16", "onnxruntime", "fp16")
    assert (contract.prompt.precision, contract.step.precision) == ("fp32", "fp16")
    assert contract.built_with["text_in_fp32"].startswith("twin: prompt: captions at a batch, rel-L2")
    assert "the text encoders stay in fp32: twin: prompt" in said
    assert "the text encoders are in fp32, for in fp16 a gate fails" in (built.folder / REPORT).read_text()
    assert max(errors(built)) < 1e-4
    weights = sum(p.numel() for p in tiny.t5(tiny.t5_tokenizer()).parameters())
    assert text_size(contract) >= 4 * weights


@pytest.mark.slow
def test_encoders_that_fail_in_fp32_start_no_search(checkpoint, tmp_path, monkeypatch) -> None:
    """Layers of the transformer are not what fails."""
    right = text.encode
    monkeypatch.setattr(text, "encode", lambda *arguments: {name: 2 * rows for name, rows in right(*arguments).items()})
    monkeypatch.setattr(building.Making, "search", lambda *_: pytest.fail("layers of the transformer were searched"))
    recipe = Recipe(
        checkpoint=str(checkpoint),
        output=str(tmp_path / "int8"),
        backend="openvino",
        precision="int8",
        caption_tokens=TOKENS,
        latents_only=True,
        max_batch=2,
    )
    built = building.build(recipe, Progress(io.StringIO()))
    assert not built.passed and "--without-text-encoders" in built.advice


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_int8(checkpoint, tmp_path, backend) -> None:
    built, contract, _ = build(checkpoint, tmp_path / "int8", backend, "int8")
    assert (contract.prompt.precision, contract.step.precision) == ("fp32", "int8")
    weights = sum(p.numel() for p in tiny.t5(tiny.t5_tokenizer()).parameters())
    assert text_size(contract) < 2.2 * weights and max(errors(built)) < TOLERANCES["bf16"].prediction
