"""The contenders of a benchmark, and the work that each of them times."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dit_export.networks.spec import ModelSpec
from dit_runtime.errors import UsageError, nearest
from dit_runtime.sampling.process import Process

JOB = "job.json"
GIB = 1 << 30
KINDS = {  # kind -> how a row of it is named
    "eager": "PyTorch eager",
    "graph": "PyTorch eager in a CUDA graph",
    "compile": "torch.compile",
    "autotune": "torch.compile max-autotune",
    "aoti": "AOTInductor",
    "diffusers": "diffusers DiTPipeline",
    "plain": "plain export on",
    "ours": "dit-export on",
}
COMPILERS = ("compile", "autotune", "aoti")
LIBRARIES = {
    "pytorch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
}


@dataclass(frozen=True)
class Competitor:
    kind: str
    library: str
    precision: str

    @property
    def engine(self) -> bool:
        return self.library != "pytorch"

    @property
    def name(self) -> str:
        """Return the name that `--only` takes: eager-bf16, ours-openvino-bf16."""
        return "-".join([self.kind, *([self.library] if self.engine else []), self.precision])

    @property
    def title(self) -> str:
        return " ".join([KINDS[self.kind], *([LIBRARIES[self.library]] if self.engine else []), self.precision])

    @property
    def folder(self) -> str:
        """Return the folder of the files that a competitor opens. The folder's size is its size on disk."""
        if self.kind == "ours":
            return self.name
        return "weights" if self.kind in ("eager", "graph", *COMPILERS) else self.kind


YARDSTICK = Competitor("eager", "pytorch", "fp32")
# A pair of ours that cannot be built here, or a library that is not installed, is left out with the reason.
CPU = (
    YARDSTICK,
    Competitor("eager", "pytorch", "bf16"),
    Competitor("compile", "pytorch", "fp32"),
    Competitor("compile", "pytorch", "bf16"),
    Competitor("aoti", "pytorch", "fp32"),
    Competitor("aoti", "pytorch", "bf16"),
    Competitor("diffusers", "pytorch", "fp32"),
    Competitor("diffusers", "pytorch", "bf16"),
    Competitor("plain", "onnxruntime", "fp32"),
    Competitor("ours", "onnxruntime", "fp32"),
    Competitor("ours", "onnxruntime", "int8"),
    Competitor("plain", "openvino", "fp32"),
    Competitor("ours", "openvino", "fp32"),
    Competitor("plain", "openvino", "bf16"),
    Competitor("ours", "openvino", "bf16"),
    Competitor("ours", "openvino", "int8"),
)
CUDA = (
    YARDSTICK,
    *(Competitor(kind, "pytorch", half) for kind in ("eager", "graph", *COMPILERS) for half in ("fp16", "bf16")),
    Competitor("plain", "onnxruntime", "fp32"),
    *(Competitor("ours", "onnxruntime", precision) for precision in ("fp32", "fp16", "bf16")),
    *(
        Competitor("ours", backend, precision)
        for backend in ("tensorrt", "tensorrt-rtx")
        for precision in ("fp16", "bf16", "int8", "fp8")
    ),
)
COMPETITORS = {"cpu": CPU, "cuda": CUDA}  # by device


def choose(patterns: Sequence[str], device: str = "cpu") -> list[Competitor]:
    """Return the competitors that match a pattern ("ours-*"), or all without a pattern. The yardstick is always
    included."""
    names = [competitor.name for competitor in COMPETITORS[device]]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise UsageError(f"competitor {pattern!r} is not known{nearest(pattern, names)}; known: {', '.join(names)}")
    return [
        competitor
        for competitor in COMPETITORS[device]
        if competitor is YARDSTICK or not patterns or any(fnmatch(competitor.name, pattern) for pattern in patterns)
    ]


@dataclass(frozen=True)
class Job:
    """The same for everyone; workers read it from their folder."""

    spec: ModelSpec
    process: Process
    batch: int
    steps: int
    threads: int
    precisions: tuple[str, ...]  # whose GEMMs are timed for the floor
    vae: Mapping[str, Any]  # config of the AutoencoderKL; empty: Stable Diffusion's
    device: str = "cpu"
    presets: Mapping[str, Any] = field(default_factory=dict)  # of our bundles: each draws a picture with each

    def write(self, folder: Path) -> None:
        table = asdict(self) | {"process": self.process.to_dict()}
        (folder / JOB).write_text(json.dumps(table), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Job:
        table = json.loads((folder / JOB).read_text(encoding="utf-8"))
        parts = {
            "spec": ModelSpec(**table["spec"]),
            "process": Process.from_dict(table["process"]),
            "precisions": tuple(table["precisions"]),
        }
        return cls(**table | parts)


# What a worker keeps: the libraries themselves, and their share of the fp32 weights (OpenVINO's is its peak at load).
BASE = {"pytorch": 0.45 * GIB} | dict.fromkeys(("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"), 0.2 * GIB)
WEIGHTS = {"pytorch": 1.2, "onnxruntime": 1.3, "openvino": 2.2, "tensorrt": 1.3, "tensorrt-rtx": 1.3}
COMPILER = 0.5 * GIB
DECODER_WEIGHTS = 198e6
DECODER_PIXEL = 10_000  # bytes of its activations; PyTorch gives them back, so they count once for all that run on it


def activations(spec: ModelSpec, batch: int) -> float:
    return DECODER_PIXEL * batch * 64 * math.prod(spec.latent_shape[1:])


def memory(competitor: Competitor, spec: ModelSpec, batch: int) -> float:
    """Return an estimate in bytes; resident memory peaks higher by mapped files, which the system can take back."""
    weights = 4 * (18 * spec.depth * spec.hidden**2 + spec.num_classes * spec.hidden) + DECODER_WEIGHTS
    buffers = activations(spec, batch) if competitor.engine else 0.0
    compiler = COMPILER if competitor.kind in COMPILERS else 0.0
    return BASE[competitor.library] + compiler + WEIGHTS[competitor.library] * weights + buffers


def groups(competitors: Sequence[Competitor], spec: ModelSpec, batch: int, budget: float) -> list[list[Competitor]]:
    """Return groups of contenders, in their order, that fit into memory with the yardstick, which runs with each."""
    left = budget - memory(YARDSTICK, spec, batch) - activations(spec, batch)
    made: list[list[Competitor]] = []
    used = left
    for competitor in competitors:
        if competitor is YARDSTICK:
            continue
        need = memory(competitor, spec, batch)
        if not made or used + need > left:
            made.append([])
            used = 0.0
        made[-1].append(competitor)
        used += need
    return made or [[]]
