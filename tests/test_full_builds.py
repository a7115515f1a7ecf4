"""Whole builds of the table's sizes with made-up weights, as `make engine MODEL=… SYNTHETIC=1` makes them."""

import resource
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from dit_runtime.bundle import manifest

GIB = 1 << 30


@pytest.mark.slow
@pytest.mark.parametrize(("model", "depth"), [("S/8", 12), ("B/4", 12), ("XL/2", 28)])
def test_a_size_in_full(model: str, depth: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dit_export.cli", "build", model, "--synthetic", "-o", str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 <= 16 * GIB  # XL/2: 11 GiB
    contract = manifest.read(tmp_path / "bundle")
    assert contract.parity["passed"]
    assert contract.parity["proof"] == "sensitive"
    assert contract.built_with["passes"]["denoiser"]["hoist"] == 6 * depth + 2
    denoiser = onnx.load(tmp_path / "bundle" / "denoiser.onnx", load_external_data=False)
    assert not [node for node in denoiser.graph.node if node.op_type == "Gemm"]  # adaLN's and the embedders' linears
    if model == "XL/2":
        assert sum(contract.files[name].size for name in contract.step.onnx_files) <= 1.85e9
