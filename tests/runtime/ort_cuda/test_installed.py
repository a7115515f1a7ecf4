"""The packages that the provider is installed from: their libraries and their version."""

from __future__ import annotations

import ctypes
import sys
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest

from dit_runtime import UsageError
from dit_runtime.backends import ort, ort_cuda


def test_libraries_of_python_packages(monkeypatch, tmp_path, capsys) -> None:
    """In any folder of the package `nvidia`, each after what it needs; what ONNX Runtime prints stays unprinted."""
    loaded = ["libcublasLt.so.13"]

    def load(path: str) -> None:
        if path != Path(path).name:
            loaded.append(Path(path).name)
        elif path not in loaded:
            raise OSError(f"{path}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    for place in (
        "first/cudnn/lib/libcudnn.so.9",
        *(f"second/cu13/lib/lib{name}.so.13" for name in ("cublas", "cublasLt")),
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    nvidia = SimpleNamespace(__path__=[str(tmp_path / "first"), str(tmp_path / "second")])
    monkeypatch.setitem(sys.modules, "nvidia", nvidia)
    ort_cuda.preload(SimpleNamespace(preload_dlls=lambda: print("Failed to load libcublas.so.13")))
    assert loaded == ["libcublasLt.so.13", "libcublas.so.13", "libcudnn.so.9"]
    assert capsys.readouterr().out == ""


@pytest.fixture
def distributions(monkeypatch, tmp_path):
    """Packages by the folder that each claims, and the folder that `import onnxruntime` takes."""

    def say(taken: str, **claims: str) -> None:
        def distribution(name: str) -> SimpleNamespace:
            key = name.replace("-", "_")
            if key not in claims:
                raise metadata.PackageNotFoundError(name)
            return SimpleNamespace(version=f"1 of {name}", locate_file=lambda part: tmp_path / claims[key] / part)

        spec = SimpleNamespace(origin=str(tmp_path / taken / "onnxruntime" / "__init__.py") if taken else None)
        monkeypatch.setattr(metadata, "distribution", distribution)
        monkeypatch.setattr(util, "find_spec", lambda name: spec)

    return say


def test_the_version_is_that_of_what_is_imported(distributions) -> None:
    distributions("image", onnxruntime="venv", onnxruntime_gpu="image")
    assert ort.version() == "1 of onnxruntime-gpu"
    distributions("venv", onnxruntime="venv", onnxruntime_gpu="image")
    assert ort.version() == "1 of onnxruntime"
    distributions("source", onnxruntime="venv")
    assert ort.version() == onnxruntime.__version__
    distributions("", onnxruntime="venv")  # an empty folder
    assert ort.version() is None
    distributions("venv", onnxruntime="venv", onnxruntime_gpu="venv")
    with pytest.raises(UsageError, match=r"are both installed in .*: pip uninstall both, install one"):
        ort.version()
