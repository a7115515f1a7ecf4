"""Tests of the library's preparation and configuration.

They check where engines are searched, and what is said where they are missing.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from shutil import which

import pytest

CPP = Path(__file__).parents[2] / "runtime/cpp"


def files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


HEADERS = "include/onnxruntime_c_api.h", "include/NvInferRuntime.h"
CUDA = "include/cuda_runtime_api.h", "lib/libcudart_static.a"
Configure = Callable[..., str]


@pytest.fixture
def configure(tmp_path) -> Configure:
    """Configures one build again and again, from beside the roots, and tells its engines; CUDA is always there."""
    files(tmp_path / "cuda", *CUDA)
    options = ["-DDIT_OPENVINO=OFF", "-DDIT_PROGRAMS=OFF", "-DCUDA_ROOT=cuda"]

    def run(*flags: str, **environment: str) -> str:
        command = ["cmake", "-S", CPP, "-B", tmp_path / "build", *options, *flags]
        clean = {name: value for name, value in os.environ.items() if not name.endswith("_ROOT")}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean | environment)
        assert done.returncode == 0, done.stderr
        return re.search("Engines: (.*)\n", done.stdout)[1]

    return run


def cached(folder: Path, name: str) -> str:
    return re.search(f"^{name}:\\w+=(.*)$", (folder / "build/CMakeCache.txt").read_text(), re.MULTILINE)[1]


def test_roots_that_come_later(tmp_path, configure):
    """New roots reach a build that was configured before. A TensorRT flavour shows in its library's name, not in its
    folder's."""
    first = files(tmp_path / "rtx", *HEADERS, "lib/libonnxruntime.so", "lib/libnvinfer.so")
    second = files(tmp_path / "b", *HEADERS, "lib/libonnxruntime.so", "lib/libtensorrt_rtx.so")
    third = files(tmp_path / "c", *HEADERS, "lib/libonnxruntime.so", "lib/libnvinfer.so")
    system = f"-DCMAKE_SYSTEM_LIBRARY_PATH={first}/lib"  # where the system keeps libraries: after the root
    for root, flavour in ((first, "tensorrt"), (second, "tensorrt-rtx"), (third, "tensorrt")):
        engines = configure(system, f"-DONNXRUNTIME_ROOT={root}", f"-DTENSORRT_ROOT={root}")
        assert engines == f"onnxruntime;{flavour}"
        assert cached(tmp_path, "ONNXRuntime_LIBRARY") == f"{root}/lib/libonnxruntime.so"
        assert cached(tmp_path, "TensorRT_INCLUDE_DIR") == f"{root}/include"


def test_a_relative_root(tmp_path, configure):
    """Is one of where CMake was called, as `make cpp TENSORRT_ROOT=…` calls it."""
    root = files(tmp_path / "a", *HEADERS, "lib/libonnxruntime.so", "lib/libnvinfer.so")
    assert configure("-DONNXRUNTIME_ROOT=a", "-DTENSORRT_ROOT=a") == "onnxruntime;tensorrt"
    assert cached(tmp_path, "ONNXRuntime_LIBRARY") == f"{root}/lib/libonnxruntime.so"
    assert cached(tmp_path, "TensorRT_LIBRARY") == f"{root}/lib/libnvinfer.so"


def test_roots_of_the_environment(tmp_path, configure):
    """May come later, and what is given comes before them, also nothing."""
    first = files(tmp_path / "a", *HEADERS, "lib/libonnxruntime.so", "lib/libnvinfer.so")
    second = files(tmp_path / "b", *HEADERS, "lib/libtensorrt_rtx.so")
    assert configure(f"-DONNXRUNTIME_ROOT={first}") == "onnxruntime"
    assert configure(TENSORRT_ROOT=str(first)) == "onnxruntime;tensorrt"
    assert configure("-DTENSORRT_ROOT=b", TENSORRT_ROOT=str(first)) == "onnxruntime;tensorrt-rtx"
    assert cached(tmp_path, "TensorRT_LIBRARY") == f"{second}/lib/libtensorrt_rtx.so"
    assert configure("-DTENSORRT_ROOT=", TENSORRT_ROOT=str(first)) == "onnxruntime"


def test_cuda_only_where_it_is_named(tmp_path, configure):
    root = files(tmp_path / "a", *HEADERS, "lib/libonnxruntime.so")
    assert configure(f"-DONNXRUNTIME_ROOT={root}", "-DCUDA_ROOT=") == "onnxruntime"
    assert "CUDARuntime" not in (tmp_path / "build/CMakeCache.txt").read_text()
    configure()
    assert cached(tmp_path, "CUDARuntime_LIBRARY") == f"{tmp_path}/cuda/lib/libcudart_static.a"
    assert cached(tmp_path, "CUDARuntime_INCLUDE_DIR") == f"{tmp_path}/cuda/include"


def test_the_lean_runtime_is_tensorrt(tmp_path, configure):
    root = files(tmp_path / "a", *HEADERS, "lib/libonnxruntime.so", "lib/libnvinfer_lean.so")
    assert configure(f"-DONNXRUNTIME_ROOT={root}", f"-DTENSORRT_ROOT={root}") == "onnxruntime;tensorrt"
    assert cached(tmp_path, "TensorRT_LIBRARY") == f"{root}/lib/libnvinfer_lean.so"


def test_setup_without_debian(tmp_path):
    """Nothing is installed where there is no dpkg; what the virtual environment lacks is said."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "ls", "head"):
        (tools / name).symlink_to(which(name))
    command = ["bash", CPP / "tools/setup.sh", tmp_path / "venv", tmp_path / "deps"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tools)})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"setup: error: no ONNX Runtime in {tmp_path}/venv; run: make setup\n"


def test_as_a_subproject(tmp_path):
    """Neither programs nor examples are built, and the parent's build type stays as it is."""
    root = files(tmp_path / "a", *HEADERS, "lib/libonnxruntime.so")
    parent = "cmake_minimum_required(VERSION 3.22)\nproject(parent LANGUAGES C CXX)\n"
    (tmp_path / "CMakeLists.txt").write_text(parent + f"add_subdirectory({CPP} dit)\n")
    options = [f"-DONNXRUNTIME_ROOT={root}", "-DDIT_OPENVINO=OFF", "-DCMAKE_BUILD_TYPE="]
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build", *options]
    subprocess.run(command, check=True, capture_output=True)
    assert cached(tmp_path, "DIT_PROGRAMS") == "OFF" and cached(tmp_path, "CMAKE_BUILD_TYPE") == ""
    listed = ["cmake", "--build", tmp_path / "build", "--target", "help"]
    targets = subprocess.run(listed, capture_output=True, text=True)
    names = {line.split()[1] for line in targets.stdout.splitlines() if line.startswith("... ")}
    assert {"dit", "dit-onnxruntime"} <= names and not {"dit-generate", "example-c", "unit-tests"} & names


def test_the_presets(tmp_path):
    """Each preset is one of CMake's, and its files are there."""
    listed = subprocess.run(["cmake", "--list-presets=all", CPP], capture_output=True, text=True, cwd=CPP)
    assert listed.returncode == 0, listed.stderr
    assert {"release", "static", "tests", "asan", "aarch64"} <= set(re.findall(r'"(\w+)"', listed.stdout))
    assert (CPP / "cmake/aarch64.cmake").is_file()
