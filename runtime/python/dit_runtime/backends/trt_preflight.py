"""A check of memory and disk before a graph is compiled, from the graph's bytes alone."""

from __future__ import annotations

import shutil
from pathlib import Path

from dit_runtime.errors import UsageError

MEMORY_FACTOR, DISK_FACTOR = 4, 1.5  # of a graph's bytes: XL/2 in fp16 took 3.2 GB for its 0.9, S/2's engine 1.35
RESERVE = 512 << 20


def preflight(folder: Path, size: int, gpu_memory: int | None) -> None:
    """Refuse a graph of `size` bytes before the work, where memory or disk is too small for it.

    `gpu_memory` is free on the GPU that the graph is compiled on. The weights alone must fit; how much more a builder
    takes there has not been measured.
    """
    needs = {
        "disk": (int(DISK_FACTOR * size), shutil.disk_usage(folder).free),
        "memory": (MEMORY_FACTOR * size + RESERVE, _available_memory()),
        "GPU memory": (size, gpu_memory),
    }
    for what, (needed, free) in needs.items():
        if free is not None and free < needed:
            raise UsageError(
                f"{folder}: {free / 1e9:.1f} GB of {what} free, expected {needed / 1e9:.1f} GB to compile this graph"
            )


def _available_memory() -> int | None:
    """Return the bytes that Linux could give to us now, its caches included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)
