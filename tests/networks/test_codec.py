"""Decoders of diffusers' VAEs: PyTorch's own images, from live modules and from folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor

from dit_export.checkpoints.vae import read_vae
from dit_export.graph import onnxfile, repairs, trace
from dit_export.networks.codec import make_decoder
from dit_export.passes import LOWERINGS
from dit_export.passes.subpixel import subpixel
from dit_runtime import backends
from dit_runtime.backends import Options
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError
from dit_runtime.images import psnr
from tests.networks.tiny import distance

CHANNELS, SIDE = 8, 4


def kl(stages: int, **config: Any) -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16,) * stages,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        norm_num_groups=8,
        **{"latent_channels": CHANNELS} | config,
    ).eval()


def dc(**config: Any) -> Any:
    """A small DC-AE with both kinds of blocks: convolutions, and linear attention at two scales."""
    torch.manual_seed(0)
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    sides = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in {
        "block_types": blocks,
        "block_out_channels": (16, 16, 32),
        "layers_per_block": (1, 1, 1),
        "qkv_multiscales": ((), (), (5,)),
    }.items()}  # fmt: skip
    vae = AutoencoderDC(latent_channels=CHANNELS, attention_head_dim=4, scaling_factor=0.41407, **sides | config)
    return vae.eval()


def expected(vae: Any, latents: Tensor) -> Tensor:
    """Decode as the pipelines do."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        return (vae.decode(latents / vae.config.scaling_factor + shift).sample / 2 + 0.5).clamp(0, 1)


def latents(rows: int = 3) -> Tensor:
    return torch.randn(rows, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


CASES = {
    "one stage": (lambda: kl(1), 1),
    "two stages": (lambda: kl(2, latents_mean=None), 2),
    "five stages": (lambda: kl(5), 16),
    "a shift": (lambda: kl(3, shift_factor=0.3, scaling_factor=0.5), 4),
    "no convolutions between": (lambda: kl(2, use_quant_conv=False, use_post_quant_conv=False), 2),
    "no attention": (lambda: kl(2, mid_block_add_attention=False), 2),
    "dc": (dc, 4),
    "dc by interpolation": (lambda: dc(upsample_block_type="interpolate"), 4),
}


@pytest.mark.parametrize("name", CASES)
def test_a_decoder_is_diffusers(name) -> None:
    make, pixels = CASES[name]
    vae = make()
    decoder = make_decoder(vae)
    with torch.no_grad():
        images = decoder(latents())
    assert (decoder.channels, decoder.pixels) == (CHANNELS, pixels)
    assert images.shape == (3, 3, pixels * SIDE, pixels * SIDE)
    assert torch.equal(images, expected(vae, latents()))
    assert images.std() > 0.01 and distance(expected(vae, latents() + 0.1), images) > 1e-3


@pytest.mark.parametrize("make", [lambda: kl(3), dc])
def test_from_a_folder(tmp_path, make) -> None:
    vae = make()
    vae.half().save_pretrained(tmp_path / "vae")
    read, files = read_vae(tmp_path, CHANNELS, pixels=4)
    assert type(read) is type(vae) and [file.parent for file in files] == [tmp_path / "vae"]
    assert torch.equal(expected(read, latents()), expected(vae.float(), latents()))


def test_a_counter_of_a_batch_norm_is_no_weight(tmp_path) -> None:
    vae = dc(decoder_norm_types="batch_norm")
    vae.save_pretrained(tmp_path)
    assert any(name.endswith("num_batches_tracked") for name in vae.state_dict())
    read, _ = read_vae(tmp_path, CHANNELS, pixels=4)
    assert torch.equal(expected(read, latents()), expected(vae, latents()))


@pytest.mark.parametrize(
    ("channels", "pixels", "words"),
    [(CHANNELS, 8, "4 pixels a cell, expected 8"), (4, 4, "8 channels, expected 4")],
)
def test_what_does_not_fit_the_network(tmp_path, channels, pixels, words) -> None:
    dc().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"its latents have {words}"):
        read_vae(tmp_path, channels, pixels)


def test_an_unknown_class() -> None:
    with pytest.raises(UsageError, match="ConvDecoder: not a known VAE; known: AutoencoderKL,"):
        make_decoder(type("ConvDecoder", (torch.nn.Module,), {})())


def traced(folder: Path) -> Path:
    """Write the graph of a small DC-AE's decoder."""
    state = Port("latents", "state", "float32", (CHANNELS, SIDE, SIDE))
    trace.export_decoder(make_decoder(dc()), state).save(folder / "traced.onnx", external_data=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return traced(tmp_path_factory.mktemp("codec"))


def run(folder: Path, backend: str, rows: Tensor) -> np.ndarray:
    """Return the images of the graph with the passes of a backend, on that backend."""
    graph = onnxfile.load(folder / "traced.onnx")
    for rewrite in (subpixel, *LOWERINGS[backend]):
        rewrite(graph)
    onnxfile.save(graph, folder / f"{backend}.onnx")
    engine = backends.backend(backend).open([folder / f"{backend}.onnx"], Options(threads=1))
    return np.asarray(engine.run({"latents": rows.numpy()})["images"])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_on_a_backend(folder, backend) -> None:
    images = run(folder, backend, latents())
    assert psnr(images, expected(dc(), latents()).numpy(), peak=1.0) >= 100  # sums of fp32 in another order
    assert psnr(images, expected(dc(), latents().flip(0)).numpy(), peak=1.0) < 40


def test_dead_queries_of_linear_attention(tmp_path, monkeypatch) -> None:
    """A token without a positive query divides 0 by 1e-15; without the repair, by 0."""
    monkeypatch.setattr(trace, "REPAIRS", tuple(r for r in trace.REPAIRS if r is not repairs.keep_tiny_terms))
    assert not np.isfinite(run(traced(tmp_path), "onnxruntime", latents())).all()
