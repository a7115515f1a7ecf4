"""The two packages: what their archives hold, and that they work where little else is installed."""

from __future__ import annotations

import email
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from packaging.requirements import Requirement

from dit_runtime import __version__
from dit_runtime.images import write_png
from tests.once import once
from tests.runtime.test_imports import FOREIGN

ROOT = Path(__file__).parents[2]
SOURCES = {"dit_runtime": ROOT / "runtime", "dit_export": ROOT}


class Wheels(NamedTuple):
    dit_runtime: Path
    dit_export: Path


@pytest.fixture(scope="session")
@once
def wheels(tmp_path_factory) -> Wheels:
    """Wheels that are built from the sdists alone, as by a distribution."""
    built = []
    for name, source in SOURCES.items():
        folder = tmp_path_factory.mktemp(name)
        build = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder), "--target"]
        subprocess.run([*build, "sdist"], check=True, cwd=source, capture_output=True)
        shutil.unpack_archive(folder / f"{name}-{__version__}.tar.gz", folder)
        subprocess.run([*build, "wheel"], check=True, cwd=folder / f"{name}-{__version__}", capture_output=True)
        built.append(folder / f"{name}-{__version__}-py3-none-any.whl")
    return Wheels(*built)


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def requirements(wheel: Path) -> list[Requirement]:
    """Return what the wheel requires without an extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    return [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate({"extra": ""})]


def sources(folder: Path) -> set[str]:
    listed = subprocess.run(["git", "ls-files", "."], cwd=folder, capture_output=True, text=True, check=True).stdout
    return {f"{folder.name}/{line}" for line in listed.splitlines()}


def test_the_wheels_hold_their_package_and_no_more(wheels: Wheels) -> None:
    """The runtime's carries no weights of the demo, no tests and no C++."""
    python = ROOT / "runtime/python"
    runtime = sources(python / "dit_runtime") | sources(python / "dit_serve") | {"dit_runtime/facts.json"}
    assert contents(wheels.dit_runtime) == runtime and "dit_runtime/py.typed" in runtime
    assert wheels.dit_runtime.stat().st_size <= 250_000
    assert contents(wheels.dit_export) == sources(ROOT / "dit_export")
    assert (ROOT / "runtime/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_what_they_require(wheels: Wheels) -> None:
    (numpy,) = requirements(wheels.dit_runtime)
    assert numpy.name == "numpy"
    assert [str(one) for one in requirements(wheels.dit_export)] == [f"dit-runtime=={__version__}"]


def test_one_version_everywhere() -> None:
    """CMake compares that of dit.h."""
    texts = ["CITATION.cff", *(str(path.relative_to(ROOT)) for path in (ROOT / "deploy/kubernetes").glob("*.yaml"))]
    for name in texts:
        stated = re.findall(r"(?:^version: |dit-serve:)(\d+\.\d+\.\d+)", (ROOT / name).read_text(), re.MULTILINE)
        assert stated and set(stated) == {__version__}, name
    (released, *_) = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released == __version__


def installed(name: str) -> Iterator[Distribution]:
    """Yield an installed distribution and all that it requires here; a marker that asks for an extra is not met."""
    waiting, names = [name], set()
    while waiting:
        one = distribution(waiting.pop())
        if one.name not in names:
            names.add(one.name)
            yield one
            needs = map(Requirement, one.requires or ())
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def empty(folder: Path) -> list[str]:
    """Make an environment without pip, and return the command that installs into it."""
    venv.create(folder, with_pip=False)
    return [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]


ONLINE = {name: value for name, value in os.environ.items() if name != "PIP_NO_INDEX"}


@pytest.fixture(scope="module", params=["offline", pytest.param("registry", marks=pytest.mark.slow)])
def bare(request, wheels: Wheels, tmp_path_factory) -> Path:
    """The bin folder of an environment that holds dit-runtime, onnxruntime and what that brings, and nothing else.

    Offline, links to what is installed here stand for what pip would fetch.
    """
    folder = tmp_path_factory.mktemp("bare")
    install = empty(folder)
    if request.param == "registry":  # pip builds the source, isolated
        constraints = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
        command = [*install, f"{ROOT / 'runtime'}[onnxruntime]"]
        subprocess.run(command, check=True, cwd=folder, env=ONLINE | constraints)
        return folder / "bin"
    (packages,) = folder.glob("lib/python3*/site-packages")
    for one in installed("onnxruntime"):
        for top in {file.parts[0] for file in one.files or ()} - {"..", "__pycache__"}:
            (packages / top).symlink_to(one.locate_file(top))
    subprocess.run([*install, "--no-deps", "--no-index", str(wheels.dit_runtime)], check=True, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def dated(wheels: Wheels, tmp_path_factory) -> Path:
    """The bin folder of an environment with the oldest versions that runtime/pyproject.toml admits."""
    folder = tmp_path_factory.mktemp("dated")
    project = tomllib.loads((ROOT / "runtime/pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in ("onnxruntime", "openvino", "text", "images")]
    oldest = [line.replace(">=", "==") for line in [*project["dependencies"], *itertools.chain(*extras)]]
    command = [*empty(folder), *oldest, str(wheels.dit_runtime)]
    subprocess.run(command, check=True, cwd=folder, env=ONLINE)
    return folder / "bin"


def run(
    program: Path, *arguments: object, at: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    command, variables = [program, *map(str, arguments)], os.environ | {"PYTHONPATH": ""} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=at or program.parent, env=variables)


def test_nothing_else_is_installed(bare: Path) -> None:
    code = f"import importlib.util; print([name for name in {FOREIGN!r} if importlib.util.find_spec(name)])"
    present = run(bare / "python", "-c", code).stdout
    assert "onnxruntime" in present and not set(FOREIGN[:2] + FOREIGN[5:8]) & set(re.findall(r"\w+", present))


@pytest.mark.parametrize("program", ["dit-run", "dit-serve"])
def test_the_programs_start(bare: Path, program: str) -> None:
    done = run(bare / program, "--version")
    assert (done.stdout, done.stderr, done.returncode) == (f"{program} {__version__}\n", "", 0)


def test_a_bundle_is_verified_and_drawn(bare: Path, handmade, tmp_path: Path) -> None:
    """The promise to a target device, kept by the package as it is installed, not by this source tree."""
    bundle = handmade("labels")
    done = run(bare / "dit-run", "verify", bundle)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("verified\n")
    assert "onnxruntime" in run(bare / "dit-run", "info", bundle).stdout
    done = run(bare / "dit-run", "sample", bundle, "--labels", 1, "--steps", 2, "--seed", 3, "-o", tmp_path / "a.npy")
    assert done.returncode == 0 and (tmp_path / "a.npy").stat().st_size > 128, done.stderr


def test_a_server_says_what_it_lacks(bare: Path, handmade) -> None:
    done = run(bare / "dit-serve", handmade("labels"))
    assert done.returncode == 2 and done.stderr.endswith("pip install 'dit-runtime[serve]'\n")


def test_the_toolchain_starts_beside_it(bare: Path, wheels: Wheels, tmp_path: Path) -> None:
    """dit-export's wheel, without PyTorch: the gate's command line needs NumPy alone."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*install, str(wheels.dit_export)], check=True)
    for arguments in ("--version",), ("regress", "--help"):
        done = run(bare / "python", "-m", "dit_export.cli", *arguments, PYTHONPATH=str(tmp_path))
        assert done.returncode == 0 and "dit-export" in done.stdout, done.stderr
    done = run(bare / "python", "-m", "dit_export.cli", "inspect", wheels.dit_export, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.endswith("pip install 'dit-export[export]'\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "precision"), [(name, kind) for name in ("onnxruntime", "openvino") for kind in ("fp32", "int8")]
)
def test_the_oldest_versions_verify(dated: Path, narrow, backend: str, precision: str) -> None:
    done = run(dated / "dit-run", "verify", narrow(precision, backend))
    assert done.returncode == 0 and done.stdout.endswith("verified\n"), done.stdout + done.stderr


@pytest.mark.slow
def test_the_oldest_versions_read_words_and_pictures(dated: Path, handmade, tmp_path: Path) -> None:
    write_png(tmp_path / "in.png", np.full((32, 32, 3), 99, np.uint8))
    np.save(tmp_path / "rate.npy", np.ones(1, np.float32))
    words = ["--prompt", "a red star", "--condition", "rate=rate.npy"]
    for kind, options in (("prompted", words), ("pictured", ["--labels", "1", "--image", "in.png"])):
        output = tmp_path / f"{kind}.npy"
        done = run(dated / "dit-run", "sample", handmade(kind), *options, "--steps", 2, "-o", output, at=tmp_path)
        assert done.returncode == 0 and output.is_file(), done.stderr
