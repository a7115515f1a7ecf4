"""Stable Diffusion 3.5 from a folder that diffusers wrote: built, sampled and compared with diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from dit_export.cli import main
from dit_runtime import Pipeline
from dit_runtime.bundle import manifest
from dit_runtime.images import psnr, to_uint8
from tests.networks import tiny
from tests.pixart import small_vae

SIDE, TOKENS, SEED, STEPS, GUIDANCE = 16, 20, 42, 6, 4.0
BLOCKS = 3


class Built(NamedTuple):
    pipeline: Any  # diffusers' own
    bundle: Path


def make_pipeline(**scheduler: Any) -> Any:
    """A pipeline without its text encoders: prompts come as embeddings."""
    encoders = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    vae = small_vae(
        latent_channels=16, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny.sd3(**tiny.SD3_5, num_layers=BLOCKS, sample_size=SIDE),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
        vae=vae.eval(),
        **encoders,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(pipeline: Any, folder: Path, *options: str) -> Path:
    pipeline.save_pretrained(folder / "checkpoint")
    command = ["build", "--checkpoint", str(folder / "checkpoint"), "--backend", "onnxruntime", "--max-batch", "2"]
    command += ["--caption-tokens", str(TOKENS), "-o", str(folder / "bundle")]
    assert main([*command, *options]) == 0
    return folder / "bundle"


@pytest.fixture(scope="module")
def built(tmp_path_factory, one_thread) -> Built:
    torch.manual_seed(0)
    pipeline = make_pipeline()
    with one_thread():
        return Built(pipeline, build(pipeline, tmp_path_factory.mktemp("sd3")))


def prompts(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    captions, pooled = random.normal(size=(1, TOKENS, 48)), random.normal(size=(1, 40))
    return {"captions": captions.astype(np.float32), "pooled": pooled.astype(np.float32)}


def theirs(pipeline: Any, own: dict[str, np.ndarray], negative: dict[str, np.ndarray], **options: Any) -> np.ndarray:
    embeddings = {}
    for sign, condition in (("", own), ("negative_", negative)):
        embeddings[f"{sign}prompt_embeds"] = torch.from_numpy(condition["captions"])
        embeddings[f"{sign}pooled_prompt_embeds"] = torch.from_numpy(condition["pooled"])
    generator = torch.Generator().manual_seed(SEED)
    fixed = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "generator": generator}
    size = {"height": 8 * SIDE, "width": 8 * SIDE}
    return pipeline(**embeddings, **size | fixed | options).images


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_a_run_is_diffusers(built) -> None:
    """The same seed, embeddings, schedule and guidance; another prompt, negative prompt or guidance is another run."""
    pipeline, bundle = built
    own, negative, other = (prompts(seed) for seed in range(3))
    expected = theirs(pipeline, own, negative, output_type="latent").numpy()
    options = {"steps": STEPS, "output": "latents", "seed": SEED}
    with Pipeline.load(bundle, threads=1) as pipe:
        got = pipe.sample(condition=own, negative=negative, guidance=GUIDANCE, **options)
        assert distance(got, expected) <= 1e-4  # fp32 sums in another order, six guided steps long
        for changed in (
            {"condition": other},
            {"condition": own | {"pooled": other["pooled"]}},
            {"negative": other},
            {"guidance": 3.0},
            {"seed": SEED + 1},
        ):
            request = {"condition": own, "negative": negative, "guidance": GUIDANCE} | options | changed
            assert distance(pipe.sample(**request), expected) > 0.01, changed.keys()


def test_a_picture_is_diffusers(built) -> None:
    pipeline, bundle = built
    own, negative = prompts(0), prompts(1)
    expected = theirs(pipeline, own, negative, output_type="np")
    with Pipeline.load(bundle, threads=1) as pipe:
        (image,) = pipe.sample(condition=own, negative=negative, guidance=GUIDANCE, steps=STEPS, seed=SEED)
    assert psnr(image, to_uint8(expected.transpose(0, 3, 1, 2))[0]) >= 50


def test_dynamic_shift(tmp_path, one_thread) -> None:
    """The shift follows from the count of image tokens, which a bundle's size settles."""
    torch.manual_seed(0)
    pipeline = make_pipeline(use_dynamic_shifting=True)
    with one_thread():
        bundle = build(pipeline, tmp_path, "--latents-only")
    own, negative = prompts(0), prompts(1)
    tokens = (SIDE // 2) ** 2
    mu = pipeline.scheduler.config.base_shift + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    expected = theirs(pipeline, own, negative, output_type="latent", mu=mu).numpy()
    with Pipeline.load(bundle, threads=1) as pipe:
        options = {"steps": STEPS, "output": "latents", "seed": SEED, "guidance": GUIDANCE}
        assert distance(pipe.sample(condition=own, negative=negative, **options), expected) <= 1e-4


def test_what_leaves_the_loop(built) -> None:
    """Each block's modulation leaves: 6 vectors a stream, 9 with dual attention, 2 in the last text stream and at the
    end. What depends on text and time stays: nothing with tokens is made every step."""
    contract = manifest.read(built.bundle)
    stages = {stage.name: stage for stage in contract.stages}
    timed = [tensor for stage in contract.stages if stage.runs.startswith("time") for tensor in stage.gives]
    assert sum(tensor.shape[1] for tensor in timed) == 12 * BLOCKS - 2 + 3 * 1
    assert all(len(tensor.shape) == 3 for tensor in timed)
    assert [stage.runs for stage in contract.stages][-3:] == ["step", "update", "end"]
    assert "captions" not in {tensor.name for tensor in stages["denoiser"].reads}
