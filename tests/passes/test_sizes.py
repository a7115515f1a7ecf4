"""Every size of the paper in every conditioning, traced with weights that take no disk: the passes find what is said
here, and nothing that could leave the loop stays in it."""

from dataclasses import replace
from pathlib import Path

import pytest

from dit_export.graph import onnxfile
from dit_export.networks.dit import DiT, dit_network
from dit_export.networks.spec import CONDITIONINGS, MODELS, ModelSpec, with_conditioning
from dit_export.passes import Fused
from tests.passes.conftest import fuse_dit
from tests.weightless import on_meta, plain_graph, without_weights

DEPTHS = {"S": 12, "B": 12, "L": 24, "XL": 28}
# By depth d: tensors that cross out of the loop, vectors K of a step.
LEAVES = {
    "adaln-zero": lambda d: (6 * d + 2, 6 * d + 2),
    "adaln": lambda d: (4 * d + 2, 4 * d + 2),
    "in-context": lambda d: (1, 2),  # both tokens at once
    "cross-attention": lambda d: (2 * d, 4 * d),  # keys and values of two tokens each
}
FAST = {("adaln-zero", "XL/2", 256), ("cross-attention", "S/8", 512)}  # a trace takes half a second a block
CASES = [
    pytest.param(way, name, side, marks=[] if (way, name, side) in FAST else pytest.mark.slow)
    for way in CONDITIONINGS
    for side in (256, 512)
    for name in MODELS
]


def fuse_without_weights(spec: ModelSpec, folder: Path) -> Fused:
    network = without_weights(dit_network(on_meta(DiT, spec)))
    return fuse_dit(plain_graph(network, folder), spec)


def loop_weights(spec: ModelSpec) -> int:
    """Count the weights that stay in the loop. Each block keeps qkv, proj, fc1, fc2, and a cross-attention's q and
    proj. Patches, positions, norms with weights of their own, and the last linear also stay."""
    d, plain = spec.hidden, not spec.scheme.modulation
    crossed = spec.scheme.crossed
    block = (12 + 2 * crossed) * d**2 + (9 + 2 * crossed) * d + plain * (2 + crossed) * 2 * d
    ends = (4 * spec.patch**2 + 1) * d + spec.tokens * d + (d + 1) * 8 * spec.patch**2 + plain * 2 * d
    return spec.depth * block + ends


@pytest.mark.parametrize(("way", "name", "side"), CASES)
def test_each_size_has_the_vectors_that_its_conditioning_needs(way: str, name: str, side: int, tmp_path: Path) -> None:
    spec = with_conditioning(replace(MODELS[name], latent_size=side // 8), way)
    fused = fuse_without_weights(spec, tmp_path)

    crossing, vectors = LEAVES[way](DEPTHS[name.split("/")[0]])
    assert fused.counts["hoist"] == crossing
    assert (fused.counts["pack"], fused.counts["pack_context"]) == (vectors, 0)
    shapes = {tensor.name: list(tensor.shape) for tensor in (*fused.denoiser.inputs, *fused.denoiser.outputs)}
    assert shapes.pop("conditioning") == ["groups", "batch", vectors, spec.hidden]
    assert [stage.name for stage in fused.stages] == ["conditioner"]
    assert not fused.cut.priced_out
    assert shapes.pop("guidance") == ["batch"]
    assert shapes == {key: ["batch", 4, side // 8, side // 8] for key in ("latents", "prediction", "variance")}

    # No embedder, no adaLN linear and no linear of a condition's keys and values is left in the loop, and all else is.
    # The smallest of them, a block's keys and values in XL, is 0.5 % of it.
    names = {constant.name for constant in onnxfile.constants(fused.denoiser)}
    assert not [name for name in names if "modulation." in name or "embedders" in name or "caption" in name]
    assert onnxfile.weight_bytes(fused.denoiser) == pytest.approx(4 * loop_weights(spec), rel=1e-3)
    if way == "adaln-zero":
        assert onnxfile.weight_bytes(fused.stages[-1].graph) > 4 * spec.depth * 6 * spec.hidden * (spec.hidden + 1)
    if (way, name, side) == ("adaln-zero", "XL/2", 256):
        assert onnxfile.weight_bytes(fused.denoiser) <= 1.85e9
        assert onnxfile.weight_bytes(fused.stages[-1].graph) == pytest.approx(4 * 226e6, rel=0.02)
