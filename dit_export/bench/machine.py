"""Description of a benchmark's machine: processor, memory, system, and the versions of what was compared."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dit_runtime.backends import cuda
from dit_runtime.backends.trt import RTX, TENSORRT
from dit_runtime.facts import VERSION

CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "i8mm")
PACKAGES = (
    *("torch", "diffusers", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy"),
    *TENSORRT.packages,
    *RTX.packages,
)


def describe(device: str = "cpu") -> dict[str, Any]:
    cpu = _table(CPUINFO)
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    release = ".".join(platform.release().partition("-")[0].split(".")[:2])  # which build it is changes no figure
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "memory_bytes": total_memory(),
        "system": f"{platform.system()} {release} {platform.machine()}",
        "python": platform.python_version(),
        **({"gpu": _gpu()} if device == "cuda" else {}),
    }


def _gpu() -> dict[str, Any]:
    properties = cuda.call("cudaGetDeviceProperties", cuda.call("cudaGetDevice"))
    return {
        "name": properties.name.decode(),
        "memory_bytes": int(properties.totalGlobalMem),
        "compute_capability": cuda.capability(),
        "driver_cuda": cuda.call("cudaDriverGetVersion"),
    }


def versions() -> dict[str, str]:
    installed = {"dit-export": VERSION}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def usable_cores() -> int:
    """Return how many cores this process may use, or all cores where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> float:
    """Bytes that can be had without swapping; half of all where the system does not say."""
    table = _table(MEMINFO)
    return 1024 * int(table["MemAvailable"].split()[0]) if "MemAvailable" in table else total_memory() / 2


def _table(path: Path) -> dict[str, str]:
    """The first value of each key."""
    table: dict[str, str] = {}
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            table.setdefault(key.strip(), value.strip())
    return table
