"""Every way of conditioning compiles, typed: its cross-attention, its mask and what is computed of captions too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_export.networks import Network
from dit_export.networks.families.pixart import PIXART
from dit_export.networks.spec import CONDITIONINGS, ModelSpec
from dit_export.precision.half import cast_to_half
from dit_runtime.backends import Options, backend
from dit_runtime.progress import Progress
from tests.tensorrt.graphs import dit, fuse_network, save, traced


def captioned() -> Network:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2}
    sizes |= {"cross_attention_dim": 48, "caption_channels": 32, "sample_size": 8, "patch_size": 2}
    transformer = PixArtTransformer2DModel(**sizes, use_additional_conditions=False)
    return PIXART.network(transformer.eval().requires_grad_(False), (8, 8), 120)


@pytest.mark.parametrize("way", [*(way for way in CONDITIONINGS if way != "adaln-zero"), "captions"])
def test_it_compiles_in_fp16(tmp_path: Path, way: str) -> None:
    spec = ModelSpec(depth=3, hidden=192, heads=3, patch=2, latent_size=8, num_classes=10)
    network = captioned() if way == "captions" else dit(replace(spec, conditioning=way))
    fused = fuse_network(traced(network, tmp_path), network)
    products = cast_to_half(fused.denoiser, "fp16")
    stages = [save(fused.denoiser, tmp_path, "fp16")]
    stages += [save(stage.graph, tmp_path, "fp32", stage.name, stage.runs) for stage in fused.stages]
    for stage in stages:
        options = Options(precision=stage.precision)
        census = backend("tensorrt-rtx").compile(tmp_path, stage, options, Progress()).built["census"]["products"]
        assert census.keys() <= {stage.precision} and (stage.runs != "step" or census == {"fp16": products})
