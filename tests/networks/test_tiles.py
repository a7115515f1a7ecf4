"""Tiled decoders and encoders: diffusers' own, in PyTorch and as graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_export.checkpoints import load
from dit_export.demo.store import MODEL
from dit_export.graph import onnxfile, trace
from dit_export.networks import tiles
from dit_export.networks.codec import make_decoder
from dit_export.networks.encoding import make_encoder
from dit_export.passes import LOWERINGS
from dit_export.passes.subpixel import subpixel
from dit_export.recipe import Recipe
from dit_runtime import backends
from dit_runtime.backends import Options
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError
from dit_runtime.images import psnr
from tests.networks.test_codec import CHANNELS, dc, expected, kl
from tests.networks.test_encoding import drawn, sample
from tests.networks.tiny import distance

SIDE = 32  # pixels of a tile, 8 cells


def tiled(**config):
    vae = kl(3, **config)
    tiles.enable(vae, SIDE)
    return vae


def latents(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, CHANNELS, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (16, 20), (13, 30)])
def test_tiles_are_diffusers(size) -> None:
    """Sizes that tiles do and do not divide; one tile is the whole."""
    vae, plain = tiled(shift_factor=0.3, scaling_factor=0.5), kl(3, shift_factor=0.3, scaling_factor=0.5)
    images = torch.rand(1, 3, 4 * size[0], 4 * size[1], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        decoded, moments = make_decoder(vae)(latents(*size)), make_encoder(vae)(images)
        whole = make_decoder(plain)(latents(*size))
    assert distance(decoded, expected(vae, latents(*size))) < 1e-6
    assert distance(sample(*moments), drawn(vae, images)) < 1e-5
    assert (distance(decoded, whole) > 1e-3) == (max(size) > 8)


@pytest.mark.slow
def test_as_graphs(tmp_path) -> None:
    """Each kernel stands in the file once, however many tiles it is used for."""
    vae = tiled()
    state = Port("latents", "state", "float32", (CHANNELS, 12, 8))
    trace.export_decoder(make_decoder(vae), state).save(tmp_path / "tiled.onnx", external_data=True)
    graph = onnxfile.load(tmp_path / "tiled.onnx")
    assert subpixel(graph) == 2 * 4  # of each tile
    for rewrite in LOWERINGS["onnxruntime"]:
        rewrite(graph)
    onnxfile.save(graph, tmp_path / "lowered.onnx")
    weights = sum(parameter.numel() for parameter in make_decoder(vae).parameters())
    assert (tmp_path / "lowered.onnx.data").stat().st_size < 4 * weights * 16 / 9 + 65536
    engine = backends.backend("onnxruntime").open([tmp_path / "lowered.onnx"], Options(threads=1))
    images = engine.run({"latents": latents(12, 8).numpy()})["images"]
    assert psnr(images, expected(vae, latents(12, 8)).numpy(), peak=1.0) >= 90
    assert psnr(images, expected(kl(3), latents(12, 8)).numpy(), peak=1.0) < 60


def test_a_recipes_tiles() -> None:
    recipe = Recipe(checkpoint=str(MODEL), tile=32)
    assert make_decoder(load(recipe).vae).tiles == tiles.Tiles(4, 3, 8, 24)
    assert make_encoder(load(recipe).vae).tiles == tiles.Tiles(32, 24, 1, 3)
    for side in (40, 0):
        with pytest.raises(UsageError, match=f"tile {side}; expected a multiple of 32, of whose cells a quarter"):
            load(replace(recipe, tile=side))
    with pytest.raises(UsageError, match="AutoencoderDC has no tiles here; AutoencoderKL has"):
        tiles.enable(dc(), 64)
