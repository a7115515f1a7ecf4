"""Encoders of diffusers' VAEs: PyTorch's own latents, and the graph of one on each backend."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLLTXVideo, AutoencoderKLQwenImage
from torch import Tensor

from dit_export.graph import onnxfile, trace
from dit_export.networks.codec import make_decoder
from dit_export.networks.encoding import make_encoder
from dit_export.passes import LOWERINGS
from dit_runtime import backends
from dit_runtime.backends import Options
from dit_runtime.errors import UsageError
from dit_runtime.verify import latents_psnr
from tests.networks.test_codec import CHANNELS, SIDE, dc, kl
from tests.networks.tiny import distance


def qwen() -> Any:
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.1 * n for n in range(4)], "latents_std": [1 + 0.5 * n for n in range(4)]}
    stages = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1}
    return AutoencoderKLQwenImage(**stages, **statistics, temperal_downsample=[False, True]).eval()


def flux2() -> Any:
    torch.manual_seed(0)
    sides = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKLFlux2(**sides, block_out_channels=(16, 16, 16), latent_channels=4, norm_num_groups=8)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae.eval()


def pictures(rows: int = 2, side: int = 32) -> Tensor:
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(1))


def drawn(vae: Any, images: Tensor) -> Tensor:
    """Encode and draw as the pipelines of image-to-image do, with the seed 5."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        latents = vae.encode(2 * images - 1).latent_dist.sample(torch.Generator().manual_seed(5))
    return (latents - shift) * vae.config.scaling_factor


def sample(mean: Tensor, logvar: Tensor) -> Tensor:
    return mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: kl(3),
        lambda: kl(3, shift_factor=0.3, scaling_factor=0.5),
        lambda: kl(2, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False),
    ],
    ids=["plain", "shift", "no convolution at the end"],
)
def test_an_encoder_is_diffusers(make) -> None:
    vae = make()
    with torch.no_grad():
        mean, logvar = make_encoder(vae)(pictures())
    expected = drawn(vae, pictures())
    assert distance(sample(mean, logvar), expected) < 1e-5
    assert distance(mean, expected) > 1e-3 and distance(sample(mean, logvar + 1), expected) > 1e-3


def test_a_qwen_image_encoder() -> None:
    """It encodes one frame, with the statistics of each channel."""
    vae = qwen()
    with torch.no_grad():
        got = sample(*make_encoder(vae)(pictures()))
        latents = vae.encode(2 * pictures()[:, :, None] - 1).latent_dist.sample(torch.Generator().manual_seed(5))
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(-1, 1, 1) for name in ("mean", "std"))
    assert distance(got, (latents[:, :, 0] - mean) / std) < 1e-5


def test_latents_without_a_variance() -> None:
    """DC-AE gives latents; FLUX.2's pipelines take the mean, and so does the round trip with its decoder's cells."""
    vae = dc()
    with torch.no_grad():
        (got,) = make_encoder(vae)(pictures())
        assert distance(got, vae.encode(2 * pictures() - 1).latent * vae.config.scaling_factor) < 1e-6
        vae = flux2()
        (got,) = make_encoder(vae)(pictures())
        mode = vae.encode(2 * pictures() - 1).latent_dist.mode()
        again = make_decoder(vae)(got)
        expected = (vae.decode(mode).sample / 2 + 0.5).clamp(0, 1)
    assert distance(again, expected) < 1e-4 and expected.std() > 0.01


def test_no_encoder() -> None:
    with pytest.raises(UsageError, match="AutoencoderKLLTXVideo: no encoder is known; known: AutoencoderKL,"):
        make_encoder(AutoencoderKLLTXVideo.__new__(AutoencoderKLLTXVideo))


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "traced.onnx"
    trace.export_encoder(make_encoder(kl(2)), (3, 2 * SIDE, 2 * SIDE)).save(path, external_data=True)
    return path


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_on_a_backend(graph, tmp_path, backend) -> None:
    """Every pass fires as often as the modules say."""
    encoder, lowered = make_encoder(kl(2)), onnxfile.load(graph)
    counts = {rewrite.__name__: rewrite(lowered) for rewrite in LOWERINGS[backend]}
    assert counts == {name: encoder.expected_counts()[name] for name in counts}
    onnxfile.save(lowered, tmp_path / "lowered.onnx")
    engine = backends.backend(backend).open([tmp_path / "lowered.onnx"], Options(threads=1))
    images = pictures(3, 2 * SIDE)
    outputs = engine.run({"images": images.numpy()})
    with torch.no_grad():
        mean, logvar = (part.numpy() for part in encoder(images))
    assert outputs["mean"].shape == (3, CHANNELS, SIDE, SIDE)
    assert latents_psnr(outputs["mean"], mean) >= 80 and latents_psnr(outputs["logvar"], logvar) >= 80
    assert latents_psnr(outputs["mean"], np.flip(mean, 0)) < 40


def test_the_range_of_the_logarithm() -> None:
    """Diffusers clamps it before the latents are scaled."""
    vae = kl(2, scaling_factor=0.5)
    with torch.no_grad():
        vae.quant_conv.bias[CHANNELS:] = 100.0
        _, logvar = make_encoder(vae)(pictures())
    assert torch.allclose(logvar, torch.full_like(logvar, 20.0 + 2 * math.log(0.5)))
