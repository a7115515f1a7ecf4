"""Every size of the paper, traced with weights that take no disk: the passes find what the spec predicts."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from dit_export import graphs, trace
from dit_export.fuse import Fused, fuse
from dit_export.models.dit import DiT
from dit_export.spec import MODELS, ModelSpec

FAST = {("S/8", 512), ("XL/2", 256)}
CASES = [
    pytest.param(name, resolution, marks=[] if (name, resolution) in FAST else pytest.mark.slow)
    for resolution in (256, 512)
    for name in MODELS
]


def fuse_without_weights(spec: ModelSpec, folder: Path) -> Fused:
    """Weights of the right shapes, all zero, in a sparse file."""
    with torch.device("meta"):
        model = DiT(spec).eval().requires_grad_(False)
    model.to_empty(device="cpu")
    for index, parameter in enumerate(model.parameters()):
        parameter.view(-1)[0] = index  # else equal linears of equal inputs become one
    traced = trace.export_dit(model).model
    largest = 0
    for value in traced.graph.initializers.values():
        tensor = value.const_value
        if tensor.dtype == ir.DataType.FLOAT and tensor.nbytes >= graphs.INLINE_BYTES:
            largest = max(largest, tensor.nbytes)
            value.const_value = ir.ExternalTensor(
                "zeros", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=folder
            )
    with (folder / "zeros").open("wb") as zeros:
        zeros.truncate(largest)
    ir.save(traced, folder / "dit.onnx")
    return fuse(graphs.load(folder / "dit.onnx"), spec)


@pytest.mark.parametrize(("name", "resolution"), CASES)
def test_each_size_has_the_vectors_its_spec_predicts(name: str, resolution: int, tmp_path: Path) -> None:
    spec = replace(MODELS[name], latent_size=resolution // 8)
    fused = fuse_without_weights(spec, tmp_path)

    vectors = 6 * {"S": 12, "B": 12, "L": 24, "XL": 28}[name.split("/")[0]] + 2
    assert fused.counts["hoist"] == vectors
    assert list(fused.denoiser.inputs[1].shape) == ["groups", "batch", vectors, spec.hidden]
    assert list(fused.denoiser.outputs[0].shape) == ["batch", 4, resolution // 8, resolution // 8]

    # No adaLN linear and no embedder is left in the loop; the conditioner holds nothing of the blocks but them.
    names = {constant.name for constant in graphs.constants(fused.denoiser)}
    assert not [name for name in names if "modulation" in name or "embedders" in name]
    shapes = [constant.values.shape for constant in graphs.constants(fused.denoiser)]
    assert not [shape for shape in shapes if {6 * spec.hidden, 2 * spec.hidden} & set(shape)]
    adaln = spec.depth * 6 * spec.hidden * (spec.hidden + 1)
    assert graphs.weight_bytes(fused.conditioner) > 4 * adaln
    if (name, resolution) == ("XL/2", 256):
        assert graphs.weight_bytes(fused.denoiser) <= 1.85e9
        assert graphs.weight_bytes(fused.conditioner) == pytest.approx(4 * 226e6, rel=0.02)
