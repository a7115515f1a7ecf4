"""The Dockerfiles: linted, and what they copy, install and start is there. No container is built."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dit_serve import cli

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deploy/docker").glob("*ockerfile"))
DEVELOPMENT = ROOT / "deploy/docker/dev.Dockerfile"
SERVERS = [file for file in FILES if file != DEVELOPMENT]


def lint(file: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint") or "hadolint"
    return subprocess.run([program, "--no-color", str(file)], capture_output=True, text=True)


def copied(file: Path) -> list[str]:
    """Return what a Dockerfile copies from this folder."""
    lines = [line.split()[1:] for line in file.read_text().splitlines() if line.startswith("COPY")]
    own = [[word for word in words if not word.startswith("--chown")] for words in lines]
    return [name for words in own if not words[0].startswith("--from") for name in words[:-1]]


def build(folder: Path, names: list[str]) -> subprocess.CompletedProcess[str]:
    """Build the runtime's wheel from these files and folders alone."""
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    places = ["-w", str(folder / "wheel"), str(folder / "runtime")]
    return subprocess.run([*command, *places], capture_output=True, text=True)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_they_are_clean(file) -> None:
    done = lint(file)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_the_linter_finds_faults(tmp_path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM debian:latest\nRUN cd /tmp && apt-get install curl\n")
    assert {"DL3007", "DL3008"} <= set(re.findall(r"DL\d+", lint(file).stdout))


@pytest.mark.parametrize("file", SERVERS, ids=lambda file: file.name)
def test_what_they_install(file) -> None:
    extras = tomllib.loads((ROOT / "runtime/pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"'\./runtime\[(.*?)\]'", file.read_text())
    assert set(named.split(",")) <= extras.keys()
    assert "serve" in named and "--constraint constraints.txt" in file.read_text()


def test_a_machine_to_develop_on_has_what_make_needs() -> None:
    """Debian's packages that setup.sh and its callers in the Makefile name, and the browser."""
    setup = (ROOT / "runtime/cpp/tools/setup.sh").read_text()
    (installs,) = re.findall(r"^for package in (.*) \"\$@\"", setup, re.MULTILINE)
    callers = re.findall(r"\$\(CPP_SETUP\) (.+)", (ROOT / "Makefile").read_text())
    needed = {"chromium", "git", *installs.split(), *" ".join(callers).split()}
    assert {"cmake", "clang", "libgtest-dev"} <= needed <= set(re.findall(r"[\w+-]+", DEVELOPMENT.read_text()))
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == DEVELOPMENT


def test_what_they_copy_makes_the_package(tmp_path) -> None:
    """A wheel is built from it, and .dockerignore lets all of it through."""
    names = copied(SERVERS[0])
    assert all(set(names) <= set(copied(file)) for file in SERVERS)
    done = build(tmp_path, names)
    assert done.returncode == 0, done.stderr
    assert [path.suffix for path in (tmp_path / "wheel").iterdir()] == [".whl"]
    let = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {name for file in FILES for name in copied(file)} == let


def test_what_it_starts() -> None:
    """dit-serve, with options that it knows, as a user without rights, and a check of its health that it answers."""
    text = (ROOT / "deploy/docker/Dockerfile").read_text()
    (entry,), (words,) = (re.findall(rf"^{name} (\[.*\])$", text, re.MULTILINE) for name in ("ENTRYPOINT", "CMD"))
    program, *arguments = json.loads(entry)
    options = cli.parser().parse_args([*arguments, *json.loads(words)])
    assert program == "dit-serve" and options.api_key_file and options.port == 8000
    assert cli._named(options.bundles) == {"bundle": Path("/bundles/bundle")}
    assert re.search(r"^USER \d+:\d+$", text, re.MULTILINE) and "127.0.0.1:8000/readyz" in text
