"""ONNX Runtime: opens the ONNX form itself, so there is nothing to compile ahead of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.backends import Compiled, Options
from dit_runtime.bundle.manifest import Stage
from dit_runtime.errors import BundleError, UsageError
from dit_runtime.facts import FACTS
from dit_runtime.progress import Progress

PRECISIONS = tuple(FACTS["precisions"]["onnxruntime"])
FLOAT_AROUND_INT8 = "fp32"
NEEDS_TYPED_GRAPH = ("fp16",)
PACKAGES = ("onnxruntime", "onnxruntime-gpu")
CPU = Path("/proc/cpuinfo")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def version() -> str | None:
    installed = []
    for package in PACKAGES:
        try:
            installed.append(metadata.version(package))
        except metadata.PackageNotFoundError:
            continue
    if len(installed) > 1:
        raise UsageError(f"{' and '.join(PACKAGES)} are both installed and overwrite each other: pip uninstall one")
    return installed[0] if installed else None


def why_unavailable(built: Mapping[str, Any] | None = None) -> str | None:
    """Return None: it runs on every CPU."""
    return None


def _saturates() -> bool:
    """Tell whether u8 × s8 products overflow 16 bits here: on x86 without VNNI, or where the system does not say."""
    try:
        flags = CPU.read_text()
    except OSError:
        return True
    return "sse2" in flags and "vnni" not in flags


def compile(folder: Path, stage: Stage, options: Options, progress: Progress) -> Compiled:
    """Make no files: the session is made from the ONNX form when it is opened."""
    return Compiled()


def open(files: Sequence[Path], options: Options) -> OrtEngine:
    return OrtEngine(files[0], options)


class OrtEngine:
    def __init__(self, path: Path, options: Options) -> None:
        try:
            import onnxruntime as ort
        except ImportError:
            raise UsageError("onnxruntime is not installed: pip install 'dit-export[onnxruntime]'") from None

        if options.threads is not None and options.threads < 1:
            raise UsageError(f"threads is {options.threads}; expected 1 or more")
        provider = PROVIDERS.get(options.provider or "cpu")
        if provider is None or provider not in ort.get_available_providers():
            here = [name for name, provider in PROVIDERS.items() if provider in ort.get_available_providers()]
            raise UsageError(f"provider {options.provider!r} is not in this onnxruntime; here: {', '.join(here)}")
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        if _saturates():  # then as u8 × u8, exact, and at 0.4 of the speed also where it would not be needed
            settings.add_session_config_entry("session.x64quantprecision", "1")
        if options.precision == "fp8":  # of a GPU's graph, tried here: its fusions of Q and DQ are for int8 alone
            settings.add_session_config_entry("session.disable_quant_qdq", "1")
        if options.threads:
            settings.intra_op_num_threads = options.threads
        if options.low_memory:  # blocks go back to the system when they are free, not when the session ends
            settings.enable_cpu_mem_arena = False
        try:
            self._session: Any = ort.InferenceSession(path, settings, providers=[provider])
        except Exception as error:  # its exceptions share no base class but this
            raise BundleError(f"{path}: ONNX Runtime does not open it: {str(error).splitlines()[0]}") from None
        self._session.disable_fallback()
        if provider not in self._session.get_providers():
            raise UsageError(f"provider {options.provider!r} did not start here; ONNX Runtime offers only the CPU")
        self._outputs = tuple(tensor.name for tensor in self._session.get_outputs())
        self._inputs = tuple(tensor.name for tensor in self._session.get_inputs())

    @property
    def io(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self._inputs, self._outputs

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))

    def close(self) -> None:
        self._session = None
