"""ONNX Runtime: opens the ONNX form itself, so there is nothing to compile ahead of time. On CUDA see ort_cuda.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.backends import PROVIDER_FORMS, QUANTIZED, Compiled, Engine, Options
from dit_runtime.bundle.manifest import Stage
from dit_runtime.errors import BundleError, UsageError
from dit_runtime.facts import FACTS
from dit_runtime.progress import Progress

PRECISIONS = tuple(FACTS["precisions"]["onnxruntime"])
FLOAT_AROUND_INT8 = "fp32"
NEEDS_TYPED_GRAPH = ("fp16", "bf16")
PACKAGES = ("onnxruntime", "onnxruntime-gpu")
CPU = Path("/proc/cpuinfo")
STREAMED = {  # settings that leave weights as they are stored
    "session.disable_prepacking": "1",
    "optimization.constant_folding_max_output_size_in_bytes": str(1 << 20),
    "optimization.disable_specified_optimizers": "FuseFp16InitializerToFp32NodeTransformer",
}
SILENT = 4  # fatal: errors are exceptions, and what a graph says in them is not for terminals
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
(CUDA_FORM,) = PROVIDER_FORMS


def version() -> str | None:
    """Return the version of what `import onnxruntime` would load."""
    spec = util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:  # a folder that an uninstall has left is no package
        return None
    folder, owners = Path(spec.origin).resolve().parent, []
    for package in PACKAGES:
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            continue
        if Path(str(distribution.locate_file("onnxruntime"))).resolve() == folder:
            owners.append(distribution.version)
    if len(owners) > 1:
        raise UsageError(f"{' and '.join(PACKAGES)} are both installed in {folder}: pip uninstall both, install one")
    return owners[0] if owners else str(load().__version__)  # built from source, or of another name


def load() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UsageError("onnxruntime is not installed: pip install 'dit-runtime[onnxruntime]'") from None
    return onnxruntime


def gpu(provider: str | None) -> int | None:
    """Return the number of the GPU that a provider names, "cuda" or "cuda:1"; None for the CPU."""
    name, colon, number = (provider or "cpu").partition(":")
    if name == "cuda" and (not colon or (number.isascii() and number.isdecimal())):
        return int(number or 0)
    if provider not in (None, "cpu"):
        raise UsageError(f"provider {provider!r} is not known; known: cpu, cuda, cuda:N for GPU number N")
    return None


def form(options: Options) -> str:
    """Return the name of the form that a provider opens."""
    return "onnxruntime" if gpu(options.provider) is None else CUDA_FORM


def refusal(precision: str, provider: str | None) -> str | None:
    """Return why a provider cannot run a graph of this precision; None where it can."""
    on_gpu = gpu(provider) is not None
    if on_gpu and precision in QUANTIZED:
        return f"{precision} has no kernels in ONNX Runtime's CUDA provider; build fp16, or use provider cpu"
    if precision == "bf16" and not on_gpu:
        return "bf16 has no kernels in ONNX Runtime's CPU provider; use provider cuda"
    return None


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


def open(files: Sequence[Path], options: Options) -> Engine:
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"threads is {options.threads}; expected 1 or more")
    if reason := refusal(options.precision, options.provider):
        raise UsageError(f"{files[0]}: {reason}")
    if (number := gpu(options.provider)) is not None:
        from dit_runtime.backends.ort_cuda import OrtCudaEngine

        return OrtCudaEngine(load(), files[0], options, number)
    return OrtEngine(files[0], options)


class OrtEngine:
    def __init__(self, path: Path, options: Options) -> None:
        ort = load()
        settings = ort.SessionOptions()
        settings.log_severity_level = SILENT
        if _saturates():  # then as u8 × u8, exact, and at 0.4 of the speed also where it would not be needed
            settings.add_session_config_entry("session.x64quantprecision", "1")
        if options.precision == "fp8":  # of a GPU's graph, tried here: its fusions of Q and DQ are for int8 alone
            settings.add_session_config_entry("session.disable_quant_qdq", "1")
        if options.threads:
            settings.intra_op_num_threads = options.threads
        if options.low_memory or options.streamed:  # free blocks go back to the system before the session ends
            settings.enable_cpu_mem_arena = False
        if options.streamed:  # so that weights stay in the file, and what is made of one goes before the next comes
            for name, value in STREAMED.items():
                settings.add_session_config_entry(name, value)
        try:
            self._session: Any = ort.InferenceSession(path, settings, providers=[PROVIDERS["cpu"]], enable_fallback=0)
        except Exception as error:  # its exceptions share no base class but this
            raise BundleError(f"{path}: ONNX Runtime does not open it: {str(error).splitlines()[0]}") from None
        self._outputs = tuple(tensor.name for tensor in self._session.get_outputs())
        self._inputs = tuple(tensor.name for tensor in self._session.get_inputs())

    @property
    def io(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self._inputs, self._outputs

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))

    def close(self) -> None:
        self._session = None
