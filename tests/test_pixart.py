"""PixArt-alpha from a folder that diffusers wrote: built, sampled and compared with diffusers' own parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

from dit_export.graph import onnxfile
from dit_runtime import Pipeline
from dit_runtime.bundle import manifest
from dit_runtime.cli import main as run
from dit_runtime.images import psnr, to_uint8
from tests.pixart import CHANNELS, SIDE, TOKENS, WIDTH, build, save

TOLERANCE = 1e-4  # of the largest value: fp32 sums in another order through four guided steps; measured 1e-6
STEPS, GUIDANCE = 4, 4.5


def captions(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Embeddings of different lengths, by port."""
    random = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, TOKENS, CHANNELS, generator=random)
    mask = (torch.arange(TOKENS) < torch.randint(3, TOKENS, (count, 1), generator=random)).float()
    return {"captions": embeddings, "mask": mask}


def arrays(condition: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: rows.numpy() for name, rows in condition.items()}


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def theirs(
    checkpoint: Path,
    transformer: PixArtTransformer2DModel,
    own: dict[str, torch.Tensor],
    negative: dict[str, torch.Tensor],
    latents: torch.Tensor,
    pixels: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Latents of a guided run, as diffusers' pipeline makes them; `pixels` is what a network is told of the size."""
    scheduler = DPMSolverMultistepScheduler.from_pretrained(checkpoint / "scheduler")
    scheduler.set_timesteps(STEPS)
    rows = {name: torch.cat([negative[name].expand_as(own[name]), own[name]]) for name in own}
    added: dict[str, torch.Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if pixels:
        size = torch.tensor([[*map(float, pixels)]]).repeat(4, 1)
        added = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
    for t in scheduler.timesteps:
        out = transformer(
            latents.repeat(2, 1, 1, 1),
            timestep=t.expand(4),
            encoder_hidden_states=rows["captions"],
            encoder_attention_mask=rows["mask"],
            added_cond_kwargs=added,
        ).sample
        null, conditional = out[:, :4].chunk(2)
        latents = scheduler.step(null + GUIDANCE * (conditional - null), t, latents).prev_sample
    return latents


@pytest.fixture(scope="module")
def transformer(pixart) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel.from_pretrained(pixart.checkpoint / "transformer").eval()


def compare(
    checkpoint: Path,
    transformer: PixArtTransformer2DModel,
    bundle: Path,
    height: int = 8 * SIDE,
    width: int = 8 * SIDE,
    pixels: tuple[int, int] | None = None,
) -> float:
    """Largest error of a guided run's latents, over the largest value."""
    own, negative, x = captions(2, 4), captions(1, 5), noise(height, width)
    expected = theirs(checkpoint, transformer, own, negative, x, pixels).numpy()
    with Pipeline.load(bundle) as pipe:
        got = pipe.sample(
            condition=arrays(own),
            negative=arrays(negative),
            steps=STEPS,
            guidance=GUIDANCE,
            latents=x.numpy(),
            output="latents",
        )
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def test_a_run_is_diffusers(pixart, transformer) -> None:
    checkpoint, bundle = pixart
    assert compare(checkpoint, transformer, bundle) <= TOLERANCE
    for part in (
        transformer.transformer_blocks[1].attn2.to_v.bias,
        transformer.transformer_blocks[2].scale_shift_table,
    ):
        original = part.detach().clone()
        with torch.no_grad():
            part.view(-1)[7] += 3
        assert compare(checkpoint, transformer, bundle) > 10 * TOLERANCE
        part.data.copy_(original)


def test_a_picture_is_diffusers(pixart, transformer) -> None:
    checkpoint, bundle = pixart
    own, negative, x = captions(2, 4), captions(1, 5), noise(8 * SIDE, 8 * SIDE)
    latents = theirs(checkpoint, transformer, own, negative, x)
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae")
    with torch.no_grad():
        expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).numpy()
    options = {"condition": arrays(own), "negative": arrays(negative), "steps": STEPS, "latents": x.numpy()}
    with Pipeline.load(bundle) as pipe:
        images = pipe.sample(**options, guidance=GUIDANCE)
        other = pipe.sample(**options, guidance=3.0)
    ratios = [psnr(*pair) for pair in zip(images, to_uint8(expected), strict=True)]
    assert min(ratios) >= 50  # the fp32 pictures differ in single levels of 255 at most
    assert max(psnr(*pair) for pair in zip(other, to_uint8(expected), strict=True)) < 50


def test_a_caption_is_read_once_an_image(pixart) -> None:
    """Neither the projection of captions nor a key or value of theirs is left in the loop."""
    _, bundle = pixart
    contract = manifest.read(bundle)
    assert [stage.runs for stage in contract.stages] == ["condition", "time", "step", "update", "end"]
    context, modulation, step = contract.stages[:3]
    assert {port.name for port in context.reads} == {"captions", "mask"}
    assert [port.name for port in modulation.reads] == ["timesteps"]
    assert modulation.gives[0].shape == ("rows", 6 * 3 + 2, WIDTH)
    loop = onnxfile.weight_bytes(onnxfile.load(bundle / step.onnx))
    block = 4 * (4 * WIDTH**2 + 2 * WIDTH**2 + 8 * WIDTH**2)  # attention, the cross-attention's q and proj, MLP
    assert loop < 1.1 * (3 * block + 4 * WIDTH * (16 + 32))  # and what the patches and the last linear have
    read = onnxfile.weight_bytes(onnxfile.load(bundle / context.onnx))
    assert read >= 4 * (CHANNELS * WIDTH + WIDTH**2 + 3 * 2 * WIDTH**2)


def test_other_sizes_spread_the_positions(pixart, transformer, tmp_path, one_thread) -> None:
    checkpoint, _ = pixart
    with one_thread():
        assert build(checkpoint, tmp_path / "wide", "--latents-only", "--resolution", "96x192") == 0
    assert compare(checkpoint, transformer, tmp_path / "wide", 96, 192) <= TOLERANCE


def test_a_network_with_the_size_of_its_images(tmp_path, one_thread, capsys) -> None:
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    with one_thread():
        transformer = save(checkpoint, use_additional_conditions=True, interpolation_scale=2)
        assert build(checkpoint, bundle, "--latents-only", "--resolution", "128x64") == 0
    assert compare(checkpoint, transformer, bundle, 128, 64, pixels=(128, 64)) <= TOLERANCE
    assert compare(checkpoint, transformer, bundle, 128, 64, pixels=(64, 128)) > 10 * TOLERANCE
    path = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["adaln_single.emb.aspect_ratio_embedder.linear_2.bias"]
    save_file(state, path)
    assert build(checkpoint, tmp_path / "x", "--latents-only") == 2
    assert "adaln_single.emb.aspect_ratio_embedder.linear_2.bias is missing" in capsys.readouterr().err


def test_embeddings_from_files(pixart, tmp_path, capsys) -> None:
    _, bundle = pixart
    own, negative = arrays(captions(2, 7)), arrays(captions(1, 8))
    np.savez(tmp_path / "negative.npz", **negative)
    pairs = []
    for name, rows in own.items():
        np.save(tmp_path / f"{name}.npy", rows)
        pairs.append(f"{name}={tmp_path / name}.npy")
    out = tmp_path / "latents.npy"
    options = ["--condition", *pairs, "--negative-condition", str(tmp_path / "negative.npz"), "--steps", "2"]
    assert run(["sample", str(bundle), *options, "-o", str(out)]) == 0
    with Pipeline.load(bundle) as pipe:
        expected = pipe.sample(condition=own, negative=negative, steps=2, output="latents")
    np.testing.assert_array_equal(np.load(out), expected)
    capsys.readouterr()
    assert run(["sample", str(bundle), "--condition", *pairs, "--steps", "2", "-o", str(out)]) == 2
    assert "negative" in capsys.readouterr().err
    assert run(["sample", str(bundle), "--labels", "0", "-o", str(out)]) == 2
