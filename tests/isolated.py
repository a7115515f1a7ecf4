"""Processes with a network of their own, for what listens on all interfaces, as Ray does."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

# There is but the loopback; what a process leaves behind ends with it, for it is the first one of its namespace.
ALONE = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
Start = Callable[..., "subprocess.Popen[str]"]


def why_missing(package: str, target: str) -> str:
    """Return why a package cannot run here in a network of its own, or nothing."""
    if importlib.util.find_spec(package) is None:
        return f"needs {package}: make {target}"
    if not shutil.which("unshare") or not shutil.which("ip"):
        return "needs unshare and ip, for a network of its own: apt-get install util-linux iproute2"
    if subprocess.run([*ALONE, "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
        return f"may not make a network namespace, and {package} listens on all networks"
    return ""


def python(words: Sequence[str]) -> list[str]:
    """Return the command that runs Python so."""
    return [*ALONE, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, *words]


@contextmanager
def starting() -> Iterator[Start]:
    """Give a function that starts Python so; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: Ray's sockets have names of at most 107 bytes
        environment = os.environ | {"RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}

        def start(*words: str, **options: int) -> subprocess.Popen[str]:
            started.append(subprocess.Popen(python(words), env=environment, text=True, **options))
            return started[-1]

        try:
            yield start
        finally:
            for process in started:
                process.kill()
                process.wait()
