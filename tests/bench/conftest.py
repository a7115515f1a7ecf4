"""A run's result, made up; and PyTorch left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dit_export.bench.competitors import Competitor
from dit_export.bench.run import spread


def row(kind: str, library: str, precision: str, milliseconds: float, **changes: Any) -> dict[str, Any]:
    one = Competitor(kind, library, precision)
    times = {"step": milliseconds / 1e3, "decode": 1.5, "image": 1.5 + milliseconds / 40}
    faster = {"step": 100 / milliseconds, "decode": 1.0, "image": 4 / (1.5 + milliseconds / 40)}
    return {
        "name": one.name,
        "title": one.title,
        "kind": kind,
        "library": library,
        "precision": precision,
        "group": 1,
        "load_seconds": 2.5,
        "peak_bytes": 1_234_000_000,
        "file_bytes": 330_000_000,
        "error": 2e-6,
        "image_derived": False,
        **{
            name: spread([0.98 * value, value, 1.1 * value]) | {"times_faster": spread([faster[name]])}
            for name, value in times.items()
        },
        **changes,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "format": 1,
        "command": "dit-export bench S/2",
        "date": "2026-11-01",
        "model": {"name": "S/2", "resolution": 256},
        "settings": {"batch": 1, "steps": 25, "threads": 2, "rounds": 3, "images": 1},
        "groups": 1,
        "machine": {
            "cpu": "Processor <& Sons>",
            "cores": 2,
            "instructions": ["avx512_bf16"],
            "memory_bytes": 24e9,
            "system": "Linux 6.1 x86_64",
        },
        "rows": [
            row("eager", "pytorch", "fp32", 100, error=0.0),
            row("plain", "openvino", "bf16", 50),
            row("ours", "openvino", "bf16", 40),
            row("ours", "onnxruntime", "fp32", 80),
        ],
        "gemms": {},
        "floors": {
            "fp32": {"step": 0.06, "flops": 1.2e10, "flops_per_second": 2e11, "library": "onnxruntime"},
            "bf16": {"step": 0.03, "flops": 1.2e10, "flops_per_second": 4e11, "library": "openvino"},
        },
        "left_out": {"gemm-openvino": "ModuleNotFoundError: No module named 'openvino'"},
        "problems": [],
    }


@pytest.fixture(autouse=True)
def pytorch_as_it_was() -> Iterator[None]:
    """A competitor's process is its own, so it switches gradients off for good; here other tests come after it."""
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.set_grad_enabled(gradients)
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
