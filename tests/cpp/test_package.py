"""The library, its headers, goldens and examples, and the installed package from outside."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dit_runtime.sampling.process import FLOW_SOLVERS, NOISE_SOLVERS, SPACINGS
from tests.handmade import module

CPP = Path(__file__).parents[2] / "runtime/cpp"
CONSUMER = Path(__file__).with_name("consumer")


def test_goldens_are_what_python_computes_now():
    """After a change of schedule, solvers, noise or tolerances: `make goldens`, and mirror it in C++."""
    goldens = module("goldens")
    numbers = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
    now, committed = goldens.text(), goldens.FILE.read_text(encoding="utf-8")
    assert numbers.sub("", now) == numbers.sub("", committed), "run: make goldens"
    computed, expected = (np.array([float(word) for word in numbers.findall(text)]) for text in (now, committed))
    # Another processor's exp and log differ by an ulp.
    assert np.allclose(computed, expected, rtol=1e-9, atol=1e-12), "run: make goldens"


def headers() -> str:
    return "\n".join(path.read_text() for path in sorted((CPP / "include/dit").glob("*.h")))


def test_help_and_header_repeat_the_facts(dit_generate):
    """Neither can read facts.json where it is written down."""
    help_text = " ".join(dit_generate("--help").stdout.split())
    header = " ".join(headers().split())
    for text in (help_text, header):
        assert ", ".join(NOISE_SOLVERS) in text and ", ".join(FLOW_SOLVERS) in text and ", ".join(SPACINGS) in text


def test_only_the_c_abi_is_exported(build):
    listed = subprocess.run(["nm", "-D", "--defined-only", build / "libdit.so"], capture_output=True, text=True)
    symbols = {line.split()[-1] for line in listed.stdout.splitlines()}
    declared = set(re.findall(r"^DIT_API .*?(dit_\w+)\(", headers(), re.MULTILINE))
    assert symbols == declared and len(declared) > 10


def test_a_small_library(build, tmp_path):
    subprocess.run(["strip", "-o", tmp_path / "libdit.so", build / "libdit.so"], check=True)
    assert (tmp_path / "libdit.so").stat().st_size < 7 << 18


@pytest.fixture(scope="module")
def installed(build, tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("prefix")
    subprocess.run(["cmake", "--install", build, "--prefix", prefix], check=True, capture_output=True)
    return prefix


def test_the_installed_program_runs_where_it_is(installed, tmp_path):
    shutil.copytree(installed, tmp_path / "moved", symlinks=True)
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    command = [tmp_path / "moved/bin/dit-generate", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "onnxruntime" in done.stdout, done.stderr


@pytest.mark.parametrize("language", ["c", "cpp"])
def test_an_outside_project_finds_the_package(installed, tiny, tmp_path, language):
    """An outside project needs only CMake. The header compiles as C11 and as C++17, with warnings as errors."""
    for command in (
        ["cmake", "-S", CONSUMER, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={installed}", f"-DLANGUAGE={language}"],
        ["cmake", "--build", tmp_path],
        [tmp_path / "consumer", tiny],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "drawn\n"


def test_pkg_config(installed, tiny, tmp_path):
    (folder,) = {path.parent for path in installed.rglob("dit.pc")}
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "dit"],
        env=os.environ | {"PKG_CONFIG_PATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    command = ["cc", "-std=c11", CONSUMER / "main.c", "-o", tmp_path / "consumer", *flags]
    subprocess.run([*command, f"-Wl,-rpath,{folder.parent}"], check=True)
    assert subprocess.run([tmp_path / "consumer", tiny], capture_output=True, text=True).stdout == "drawn\n"


def test_the_documented_program_compiles_and_runs(installed, shared_embedders, tmp_path):
    text = (CPP.parents[1] / "docs" / "cpp.md").read_text()
    (block,) = re.findall(r"^```cpp\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "main.cpp").write_text(block)
    shutil.copy(CONSUMER / "CMakeLists.txt", tmp_path)
    (tmp_path / "first-bundle").symlink_to(shared_embedders.bundle)
    for command in (
        ["cmake", "-B", "build", f"-DCMAKE_PREFIX_PATH={installed}", "-DLANGUAGE=cpp"],
        ["cmake", "--build", "build"],
        ["build/consumer"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_examples(build, tiny, tmp_path):
    for command in (["example-c", tiny, "ant", tmp_path / "0.ppm"], ["example-cpp", tiny, "ant", "elk"]):
        done = subprocess.run(
            [build / "examples" / command[0], *command[1:]], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1.ppm").read_bytes().startswith(b"P6 32 32 255\n")
    done = subprocess.run([build / "examples/example-c", tiny, "emu", "x"], capture_output=True, text=True)
    assert done.returncode == 1 and "emu" in done.stderr


def test_the_examples_are_as_short_as_promised():
    lines = {name: len((CPP / "examples" / name).read_text().splitlines()) for name in ("generate.c", "generate.cpp")}
    assert lines["generate.c"] <= 50 and lines["generate.cpp"] <= 40
