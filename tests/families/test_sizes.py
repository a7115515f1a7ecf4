"""Bundles of several sizes: each size's picture is diffusers'. FLUX.1's are in test_flux.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline

from dit_export.bundle.build import build
from dit_export.recipe import Recipe
from dit_runtime import Pipeline, verify
from dit_runtime.bundle import manifest
from dit_runtime.progress import Progress
from tests.families import test_flux, test_ltx, tiny

LABELS, STEPS = [207, 3], 6


@pytest.mark.slow
def test_dit(shared_embedders, tmp_path, one_thread) -> None:
    """The table of positions is another one at each size."""
    recipe = Recipe(checkpoint=str(shared_embedders.checkpoint), resolution=[64, 96], backend="onnxruntime")
    with one_thread():
        built = build(replace(recipe, max_batch=2, output=str(tmp_path / "bundle")), Progress())
    assert built.passed
    pipeline = DiTPipeline.from_pretrained(shared_embedders.checkpoint, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    for size in (64, 96):
        pipeline.transformer.register_to_config(sample_size=size // 8)
        options = {"guidance_scale": 4.0, "num_inference_steps": STEPS, "output_type": "np"}
        generator = torch.Generator().manual_seed(42)
        with one_thread():
            expected = pipeline(class_labels=LABELS, generator=generator, **options).images
        with Pipeline.load(built.folder, threads=1, size=size) as pipe:
            state = pipe.sample(LABELS, steps=STEPS, guidance=4.0, seed=42, output="latents")
            got = np.moveaxis(pipe.engines.decode(state), 1, -1)
        assert min(tiny.distances(got, expected)) >= tiny.SAME


@pytest.mark.slow
def test_videos(tmp_path, one_thread) -> None:
    pipeline, frames = test_ltx.make_pipeline(), test_ltx.FRAMES
    with one_thread():
        bundle = tiny.build(
            pipeline, tmp_path, caption_tokens=test_ltx.TOKENS, resolution=["32x64", "64x32"], frames=frames
        )
    for height, width in ((32, 64), (64, 32)):
        call = {"height": height, "width": width, "num_frames": frames, "max_sequence_length": test_ltx.TOKENS}
        tiny.accept(tiny.Case(pipeline, bundle, call, size=f"{height}x{width}"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_int8(backend, tmp_path, one_thread) -> None:
    """One calibration serves all sizes, so their weights are the same; each size keeps its gates."""
    pipeline, tokens = test_flux.make_pipeline(shift=3.0, use_dynamic_shifting=True), test_flux.T5_TOKENS
    options = {"resolution": ["64x96", 64], "backend": backend, "precision": "int8", "caption_tokens": tokens}
    with one_thread():
        output = tiny.build(pipeline, tmp_path, **options)
    contract = manifest.read(output)
    sizes = [contract.files[f"{size.step.onnx}.data"].size for size in contract.each_size]
    assert sizes[1] < 0.1 * sizes[0]
    with Pipeline.load(output, threads=1) as pipe:
        for figure in verify.verify(pipe):
            assert figure.passed, figure
