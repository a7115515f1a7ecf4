"""How the library is made ready and configured: where engines are looked for, and what is said where they are not."""

from __future__ import annotations

import subprocess
from pathlib import Path
from shutil import which

CPP = Path(__file__).parents[2] / "runtime/cpp"
CUDA = "set(CUDAToolkit_FOUND TRUE)\nadd_library(CUDA::cudart INTERFACE IMPORTED)\n"


def files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_roots_that_come_later(tmp_path):
    """Of a build that was configured before; a flavour of TensorRT is in its library's name, not in its folder's."""
    headers = "include/onnxruntime_c_api.h", "include/NvInferRuntime.h"
    first = files(tmp_path / "rtx", *headers, "lib/libonnxruntime.so", "lib/libnvinfer.so")
    second = files(tmp_path / "b", *headers, "lib/libonnxruntime.so", "lib/libtensorrt_rtx.so")
    third = files(tmp_path / "c", *headers, "lib/libonnxruntime.so", "lib/libnvinfer.so")
    modules = files(tmp_path / "modules", "FindCUDAToolkit.cmake")
    (modules / "FindCUDAToolkit.cmake").write_text(CUDA)
    options = ["-DDIT_OPENVINO=OFF", "-DDIT_PROGRAMS=OFF", f"-DCMAKE_MODULE_PATH={modules}"]
    options += [f"-DCMAKE_SYSTEM_LIBRARY_PATH={first}/lib"]  # where the system keeps libraries: after the root

    def configure(root: Path, flavour: str) -> None:
        given = [f"-DONNXRUNTIME_ROOT={root}", f"-DTENSORRT_ROOT={root}"]
        command = ["cmake", "-S", CPP, "-B", tmp_path / "build", *options, *given]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"Engines: onnxruntime;{flavour}\n" in done.stdout
        cache = (tmp_path / "build/CMakeCache.txt").read_text()
        assert f"ONNXRuntime_LIBRARY:FILEPATH={root}/lib/libonnxruntime.so\n" in cache
        assert f"TensorRT_INCLUDE_DIR:PATH={root}/include\n" in cache

    for root, flavour in ((first, "tensorrt"), (second, "tensorrt-rtx"), (third, "tensorrt")):
        configure(root, flavour)


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
