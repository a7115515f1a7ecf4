"""XL/2 in full: compiled on a machine with no GPU, in bounded memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit_export.graph import onnxfile
from dit_export.networks.dit import DiT, dit_network
from dit_export.networks.spec import MODELS
from dit_export.precision.half import cast_to_half
from tests.tensorrt.graphs import fuse_network, traced

COMPILE = """
import sys
from pathlib import Path
from dit_runtime.backends import Options, backend
from dit_runtime.bundle.manifest import Stage, TensorSpec
from dit_runtime.progress import Progress
stage = Stage("denoiser", "step", {reads}, {gives}, "denoiser.onnx", precision="fp16")
print(backend("tensorrt-rtx").compile(Path(sys.argv[1]), stage, Options(precision="fp16"), Progress()).built["census"])
"""


@pytest.mark.slow
def test_xl_2_in_fp16(tmp_path: Path) -> None:
    spec = MODELS["XL/2"]
    with torch.device("meta"):
        model = DiT(spec)
    model = model.to_empty(device="cpu").eval()
    for parameter in (*model.parameters(), *model.buffers()):
        parameter.data.normal_(std=0.02)  # equal weights would be stored once
    network = dit_network(model)
    denoiser = fuse_network(traced(network, tmp_path), network).denoiser
    assert cast_to_half(denoiser, "fp16") == 5 * 28 + 2
    onnxfile.save(denoiser, tmp_path / "denoiser.onnx")
    reads, gives = onnxfile.signature(denoiser)
    code = COMPILE.format(reads=reads, gives=gives)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "{'fp16': 142}" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 <= 8 << 30  # measured 3.2 GB
    assert 0.85e9 < (tmp_path / "denoiser.tensorrt-rtx.engine").stat().st_size < 1.3e9
