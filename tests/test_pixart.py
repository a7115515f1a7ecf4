"""PixArt-alpha from a folder that diffusers wrote, against diffusers' own transformer and scheduler."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

from dit_runtime import Captions, Pipeline
from dit_runtime.cli import main as run
from dit_runtime.images import psnr, to_uint8
from tests.pixart import CHANNELS, SIDE, TOKENS, WIDTH, build, save

TOLERANCE = 1e-4  # of the largest value: fp32 sums in another order; measured 1e-6


def captions(count: int, seed: int) -> tuple[Captions, dict[str, torch.Tensor]]:
    """The same for our runtime and for diffusers."""
    random = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, TOKENS, CHANNELS, generator=random)
    mask = (torch.arange(TOKENS) < torch.randint(3, TOKENS, (count, 1), generator=random)).float()
    return Captions(embeddings.numpy(), mask.numpy()), {
        "encoder_hidden_states": embeddings,
        "encoder_attention_mask": mask,
    }


def told(height: int, width: int, rows: int) -> dict[str, torch.Tensor]:
    size = torch.tensor([[float(height), float(width)]]).repeat(rows, 1)
    return {"resolution": size, "aspect_ratio": (size[:, :1] / size[:, 1:])}


@pytest.fixture(scope="module")
def transformer(pixart) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel.from_pretrained(pixart.checkpoint / "transformer").eval()


@torch.no_grad()
def compare(
    transformer: PixArtTransformer2DModel, bundle: Path, height: int, width: int, size: tuple[int, int] | None = None
) -> float:
    """Largest error of an unguided evaluation, over the largest value; diffusers' is told `size`."""
    ours, theirs = captions(2, 3)
    x = torch.randn(2, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([60.0, 801.0])
    added = told(*size, 2) if size else {"resolution": None, "aspect_ratio": None}
    expected = transformer(x, timestep=times, added_cond_kwargs=added, **theirs).sample.numpy()
    with Pipeline.load(bundle) as pipe:
        rows = pipe.condition(times.numpy(), np.zeros(2, np.int64))[None]
        read = pipe.context(ours)
        context = {"context": read.vectors[None], "context_mask": read.mask[None]}
        found = np.concatenate(pipe.denoise(x.numpy(), rows, np.ones(2, np.float32), context), axis=1)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_the_transformer_is_diffusers(pixart, transformer) -> None:
    _, bundle = pixart
    assert compare(transformer, bundle, 8 * SIDE, 8 * SIDE) <= TOLERANCE
    for part in (
        transformer.transformer_blocks[1].attn2.to_v.bias,
        transformer.transformer_blocks[2].scale_shift_table,
    ):
        kept = part.detach().clone()
        with torch.no_grad():
            part.view(-1)[7] += 3
        assert compare(transformer, bundle, 8 * SIDE, 8 * SIDE) > 10 * TOLERANCE
        part.data.copy_(kept)


def test_a_run_is_diffusers(pixart, transformer) -> None:
    """The same latents, embeddings and scheduler, guidance as its pipeline mixes it, and the decoder."""
    checkpoint, bundle = pixart
    ours, theirs = captions(2, 4)
    empty, negative = captions(1, 5)
    x = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    scheduler = DPMSolverMultistepScheduler.from_pretrained(checkpoint / "scheduler")
    scheduler.set_timesteps(10)
    rows = {
        name: torch.cat([negative[name].repeat(2, *[1] * (theirs[name].ndim - 1)), theirs[name]]) for name in theirs
    }
    latents, nothing = x, {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = transformer(
                latents.repeat(2, 1, 1, 1), timestep=t.expand(4), added_cond_kwargs=nothing, **rows
            ).sample
            null, own = out[:, :4].chunk(2)
            latents = scheduler.step(null + 4.5 * (own - null), t, latents).prev_sample
        vae = AutoencoderKL.from_pretrained(checkpoint / "vae")
        expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).numpy()
    with Pipeline.load(bundle) as pipe:
        given = {"captions": ours, "negative": empty, "steps": 10, "latents": x.numpy()}
        found = pipe.sample(**given, guidance=4.5)
        other = pipe.sample(**given, guidance=3.0)
    ratios = [psnr(*pair) for pair in zip(found, to_uint8(expected), strict=True)]
    assert min(ratios) >= 50  # the fp32 pictures differ in single levels of 255 at most; measured 70
    assert max(psnr(*pair) for pair in zip(other, to_uint8(expected), strict=True)) < 50


def test_a_caption_is_read_once_an_image(pixart) -> None:
    """Neither the projection of captions nor a key or value of theirs is left in the loop."""
    from dit_export.graph import onnxfile

    _, bundle = pixart
    shapes = [tensor.values.shape for tensor in onnxfile.constants(onnxfile.load(bundle / "denoiser.onnx"))]
    assert not [shape for shape in shapes if shape in ((CHANNELS, WIDTH), (WIDTH, 2 * WIDTH), (WIDTH, 6 * WIDTH))]
    context = onnxfile.load(bundle / "context.onnx")
    assert onnxfile.weight_bytes(context) >= 4 * (CHANNELS * WIDTH + WIDTH**2 + 3 * 2 * WIDTH**2)
    assert [list(tensor.shape)[1:] for tensor in context.outputs] == [[2 * 3 * TOKENS, WIDTH], [TOKENS]]
    assert [tensor.name for tensor in onnxfile.load(bundle / "conditioner.onnx").inputs] == ["timesteps"]


def test_other_sizes_spread_the_positions(pixart, transformer, tmp_path, one_thread) -> None:
    checkpoint, _ = pixart
    with one_thread():
        assert build(checkpoint, tmp_path / "wide", "--latents-only", "--resolution", "96x192") == 0
    assert compare(transformer, tmp_path / "wide", 96, 192) <= TOLERANCE


def test_a_network_that_is_told_its_size(tmp_path, one_thread, capsys) -> None:
    with one_thread():
        transformer = save(tmp_path / "checkpoint", use_additional_conditions=True, interpolation_scale=2)
        assert build(tmp_path / "checkpoint", tmp_path / "bundle", "--latents-only", "--resolution", "128x64") == 0
    assert compare(transformer, tmp_path / "bundle", 128, 64, size=(128, 64)) <= TOLERANCE
    assert compare(transformer, tmp_path / "bundle", 128, 64, size=(64, 128)) > 10 * TOLERANCE
    path = tmp_path / "checkpoint" / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["adaln_single.emb.aspect_ratio_embedder.linear_2.bias"]
    save_file(state, path)
    assert build(tmp_path / "checkpoint", tmp_path / "x", "--latents-only") == 2
    assert "adaln_single.emb.aspect_ratio_embedder.linear_2 is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"norm_type": "ada_norm"}, "norm_type"),
        ({"caption_channels": None}, "caption_channels is None"),
        ({"cross_attention_dim": 64}, "cross_attention_dim is 64, expected 96"),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05, expected 1e-06"),
    ],
)
def test_what_is_not_supported_is_said(pixart, tmp_path, capsys, config: dict, said: str) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    source = pixart.checkpoint / "transformer"
    table = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | config))
    (folder / "diffusion_pytorch_model.safetensors").symlink_to(source / "diffusion_pytorch_model.safetensors")
    assert build(folder, tmp_path / "x", "--latents-only") == 2
    assert said in capsys.readouterr().err


def test_embeddings_from_files(pixart, tmp_path, capsys) -> None:
    _, bundle = pixart
    ours, _ = captions(2, 7)
    empty, _ = captions(1, 8)
    mask = ours.mask.astype(bool)
    for name, array in (("c", ours.embeddings), ("m", mask), ("n", empty.embeddings), ("k", empty.mask)):
        np.save(tmp_path / f"{name}.npy", array)
    files = {name: str(tmp_path / f"{name}.npy") for name in "cmnk"}
    out = tmp_path / "latents.npy"
    given = ["--captions", files["c"], "--mask", files["m"], "--negative", files["n"], "--negative-mask", files["k"]]
    assert run(["sample", str(bundle), *given, "--steps", "2", "-o", str(out)]) == 0
    with Pipeline.load(bundle) as pipe:
        expected = pipe.sample(captions=ours, negative=empty, steps=2, output="latents")
    np.testing.assert_array_equal(np.load(out), expected)
    capsys.readouterr()
    assert run(["sample", str(bundle), "--captions", files["c"], "--labels", "0", "-o", str(out)]) == 2
    assert "both labels and captions" in capsys.readouterr().err
    assert run(["sample", str(bundle), "--mask", files["m"], "-o", str(out)]) == 2
    assert "a mask without --captions" in capsys.readouterr().err
    assert run(["info", str(bundle)]) == 0
    assert "captions of up to 120 tokens x 32" in capsys.readouterr().out
