"""The binary interface changes on purpose: programs that were compiled before must run on."""

from __future__ import annotations

import shutil
import subprocess

import pytest

import dit_runtime
from tests.cpp import abi

ADVICE = "an incompatible change raises the minor version in dit.h; then: python -m tests.cpp.abi > runtime/cpp/abi.txt"


def test_the_interface_is_the_committed_one(build):
    expected = (abi.CPP / "abi.txt").read_text().splitlines()
    actual = abi.describe(build / "libdit.so")
    changes = [f"- {line}" for line in expected if line not in actual]
    changes += [f"+ {line}" for line in actual if line not in expected]
    assert not changes, "\n".join([*changes, ADVICE])


def test_a_moved_field_is_noticed(tmp_path):
    """So is a new value of an enum, and a type of another size."""
    headers = tmp_path / "dit"
    shutil.copytree(abi.CPP / "include/dit", headers)
    before = abi.layout(headers)
    options = headers / "options.h"
    options.write_text(options.read_text().replace("    int threads;", "    int64_t threads;"))
    moved = [line for line in abi.layout(headers) if line not in before]
    assert moved[0].startswith("dit_open_options has ") and any(".low_memory at 32" in line for line in moved)


def test_the_soname_has_the_minor_version(build):
    dynamic = subprocess.run(["readelf", "-d", build / "libdit.so"], check=True, capture_output=True, text=True).stdout
    assert "[libdit.so.0.2]" in dynamic


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_libdit_runs_without_an_engine(build, dit_generate, tiny, tmp_path, name):
    """A plugin that is missing, or cannot find its engine's library, takes only its own backend along."""
    moved = tmp_path / "build"
    (moved / "programs").mkdir(parents=True)
    shutil.copy(build / "programs/dit-generate", moved / "programs")
    for path in build.glob("libdit*.so*"):
        shutil.copy(path, moved, follow_symlinks=False)
    command = [moved / "programs/dit-generate", "--version"]
    environment = {"LD_LIBRARY_PATH": str(moved)}

    def version() -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    assert name in version()
    (moved / f"libdit-{name}.so").write_bytes(b"\x7fELF, cut short")
    assert f"{name} " not in version() and version().startswith(f"dit-generate {dit_runtime.__version__} (")
    asked = [command[0], tiny, "--labels", "1", "--backend", name, "-o", tmp_path / "a.npy"]
    done = subprocess.run(asked, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and f"libdit-{name}.so: " in done.stderr and done.stderr.count("\n") == 1
