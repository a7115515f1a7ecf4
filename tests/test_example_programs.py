"""The examples that use a bundle: each is run as its docstring says; the gate's workflow, line by line."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from dit_runtime import Pipeline
from dit_runtime.images import png
from tests.serve.serving import running

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, EXAMPLES / name, *map(str, arguments)], capture_output=True, text=True)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_sample(handmade, tmp_path: Path) -> None:
    done = run("sample.py", handmade("labels"), tmp_path / "new", 1, 3)
    assert done.returncode == 0, done.stderr
    with Pipeline.load(handmade("labels"), threads=1) as pipe:
        expected = pipe.sample(labels=[3], seed=1)[0]
    assert np.array_equal(pixels(tmp_path / "new/3.png"), expected) and (tmp_path / "new/1.png").is_file()


def test_image_to_image(handmade, tmp_path: Path) -> None:
    source = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(png(source))
    done = run("image_to_image.py", handmade("pictured"), 2, tmp_path / "a.png", tmp_path / "b.png")
    assert done.returncode == 0, done.stderr
    columns = np.split(pixels(tmp_path / "b.png"), 4, axis=1)
    assert np.array_equal(columns[0], source)
    with Pipeline.load(handmade("pictured"), threads=1) as pipe:
        expected = pipe.sample(labels=[2], image=source, strength=0.9, seed=7)[0]
    assert np.array_equal(columns[3], expected) and not np.array_equal(columns[1], columns[3])


def test_client(handmade, tmp_path: Path) -> None:
    with running(handmade("labels")) as server:
        address = f"http://127.0.0.1:{server.port}"
        done = run("client.py", address, "1", tmp_path / "a.png")
        refused = run("client.py", address, "nothing that it knows", tmp_path / "b.png")
    assert done.returncode == 0 and pixels(tmp_path / "a.png").shape == (32, 32, 3), done.stderr
    assert refused.returncode == 1 and re.fullmatch(r"4\d\d: .+\n", refused.stderr)


def test_the_gate_for_ci(handmade, tmp_path: Path) -> None:
    """Its commands pass the bundle of the baseline, and fail another."""
    steps = yaml.safe_load((EXAMPLES / "gate.yml").read_text())["jobs"]["gate"]["steps"]
    lines = [step["run"] for step in steps if step.get("run", "").startswith("dit-")]
    assert [line.split()[:2] for line in lines] == [["dit-run", "verify"], ["dit-export", "regress"]]
    shutil.copytree(handmade("labels"), tmp_path / "bundle")
    once = re.findall(r"^#   (dit-export .*)$", (EXAMPLES / "gate.yml").read_text(), re.MULTILINE)

    def passes(line: str) -> bool:
        program, *words = line.split()
        module = {"dit-run": "dit_runtime.cli", "dit-export": "dit_export.cli"}[program]
        done = subprocess.run([sys.executable, "-m", module, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode in (0, 1, 2), done.stderr
        return done.returncode == 0

    assert [passes(line) for line in [*once, *lines]] == [True] * 3
    assert (tmp_path / "gate.html").is_file() and (tmp_path / "gate.xml").is_file()
    (tmp_path / "bundle").rename(tmp_path / "before")
    (tmp_path / "bundle").symlink_to(handmade("captioned"))
    assert not passes(lines[-1])
