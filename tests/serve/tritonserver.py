"""A Triton Inference Server on the loopback interface, from the wheel of nvidia-pytriton (`make triton`)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "build/triton"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
SECRET = "the word of the tests"
ADMIN = "model-repository,shared-memory,trace,logging"


class Triton(NamedTuple):
    process: subprocess.Popen[bytes]
    http: int
    grpc: int
    metrics: int
    log: Path

    def get(self, path: str, port: int | None = None) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port or self.http}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""


def why_missing() -> str | None:
    """Return why the server cannot run here, or nothing."""
    library = Path(sysconfig.get_config_var("LIBDIR") or "", f"libpython{VERSION}.so.1.0")
    if not (PACKAGES / "pytriton/tritonserver/bin/tritonserver").is_file():
        return "needs Triton's server in build/triton: make triton"
    if not library.is_file():
        return f"needs a Python with a shared library, for Triton's backend: there is no {library}"
    if not (PACKAGES / "pytriton/tritonserver/python_backend_stubs" / VERSION).is_dir():
        return f"the Triton of build/triton has no backend for Python {VERSION}"
    return None


@contextmanager
def serving(repository: Path, work: Path, seconds: float = 90) -> Iterator[Triton]:
    """Serve a model repository until the block ends; the server and its children are a process group."""
    server = PACKAGES / "pytriton/tritonserver"
    backend = work / "backends/python"
    shutil.copytree(server / "backends/python", backend)
    shutil.copy2(server / "python_backend_stubs" / VERSION / "triton_python_backend_stub", backend)
    ports = [_free_port() for _ in range(3)]
    http, grpc, metrics = ports
    command = [str(server / "bin/tritonserver"), f"--model-repository={repository}"]
    command += [f"--backend-directory={work / 'backends'}", "--allow-gpu-metrics=false", "--exit-timeout-secs=10"]
    for name, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        command += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
    command += [f"--http-restricted-api={ADMIN}:admin={SECRET}", f"--grpc-restricted-protocol={ADMIN}:admin={SECRET}"]
    libraries = [PACKAGES / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "PATH": f"{_environment(work / 'venv')}{os.pathsep}{os.environ['PATH']}",
    }
    log = work / "triton.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        triton = Triton(process, http, grpc, metrics, log)
        end = time.monotonic() + seconds
        while triton.get("/v2/health/ready")[0] != 200:
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"Triton is not ready:\n{log.read_text()[-4000:]}")
            time.sleep(0.2)
        yield triton
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a server that did not end, and the Python that it left
        process.wait()


def _environment(folder: Path) -> Path:
    """Make the environment that Triton's Python finds: this one's packages, and the project as it is here.

    The backend's interpreter ignores PYTHONPATH, and takes the packages of the python3 that is first on PATH.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    paths = [ROOT / "runtime/python", ROOT, *[path for path in sys.path if path.endswith("site-packages")]]
    (packages / "project.pth").write_text("".join(f"{path}\n" for path in paths))
    return folder / "bin"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
