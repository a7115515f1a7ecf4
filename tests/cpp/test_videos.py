"""Videos in C++: Python's frames of a hand-made bundle; those of LTX-Video are a test of its family."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dit_runtime import images
from dit_runtime.cli import main
from dit_runtime.picture_files import read_picture
from tests.cpp.test_conditions import condition_flags
from tests.cpp.test_same_pictures import ENGINES, load, same_pictures
from tests.handmade import module
from tests.tamper import seal

FRAMES, SIDE, STEPS = 6, 32, 3
RATE = {"rate": np.array([0.5, 2], np.float32)}


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("video") / "bundle"
    module("make_bundle").make(folder, "video")
    return folder


def pictures(files: list[Path], height: int, width: int) -> np.ndarray:
    return np.stack([read_picture(file, height, width) for file in files])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_frames(video, dit_generate, tmp_path, engine) -> None:
    """As a folder with a file a frame, as an array, and as a grid of a row a video."""
    arguments = [*condition_flags(tmp_path, RATE, None), "--labels", 0, 2, "--steps", STEPS, "--backend", engine]
    with load(video, engine) as pipe:
        expected = pipe.sample([0, 2], condition=RATE, steps=STEPS)
    assert expected.shape == (2, FRAMES, SIDE, SIDE, 3) and len(np.unique(expected)) > 50
    for name in ("videos.npz", "grid.png", "frames"):
        done = dit_generate(video, *arguments, "-o", tmp_path / name, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["shape"] == [*expected.shape]
    assert same_pictures(np.load(tmp_path / "videos.npz")["arr_0"], expected)
    sheet = images.grid(expected)
    assert same_pictures(read_picture(tmp_path / "grid.png", *sheet.shape[:2]), sheet)
    files = sorted((tmp_path / "frames").iterdir())
    assert [file.name for file in files] == [f"{video}-{frame}.png" for video in range(2) for frame in range(FRAMES)]
    assert same_pictures(pictures(files, SIDE, SIDE), expected.reshape(-1, SIDE, SIDE, 3))


def test_a_folder_of_pictures(tiny, dit_generate, tmp_path) -> None:
    labels = [number % 5 for number in range(11)]
    assert dit_generate(tiny, "--labels", *labels, "--steps", 2, "-o", tmp_path / "pictures").returncode == 0
    files = sorted((tmp_path / "pictures").iterdir())
    assert [file.name for file in files] == [f"{number:02}.png" for number in range(11)]
    with load(tiny, "onnxruntime") as pipe:
        assert same_pictures(pictures(files, SIDE, SIDE), pipe.sample(labels, steps=2))
    (tmp_path / "file").touch()
    done = dit_generate(tiny, "--labels", 1, "-o", tmp_path / "file")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_verify(video, dit_generate, tmp_path, capsys) -> None:
    """The reference has frames 0, 3 and 4; another frame, or other numbers of frames, do not pass."""
    assert dit_generate(video, "--verify").returncode == 0
    bundle = Path(shutil.copytree(video, tmp_path / "bundle"))
    reference = dict(np.load(bundle / "reference.npz"))
    for frames, code, words in (
        ([0, 4, 3], 1, "pictures, PSNR in dB"),
        ([0, 3, 6], 2, "expected numbers of a video's frames"),
        ([0, 3, -1], 2, "expected numbers of a video's frames"),
        ([0, 3], 2, "images has shape"),
        ([[0, 3, 4]], 2, "rebuild the bundle"),
    ):
        np.savez(bundle / "reference.npz", **reference | {"frames": np.array(frames)})
        seal(bundle)
        done = dit_generate(bundle, "--verify")
        assert main(["verify", str(bundle), "--threads", "1"]) == done.returncode == code, done.stderr
        for text in (done.stdout + done.stderr, "".join(capsys.readouterr())):
            assert words in text and ("FAILED" in text) == (code == 1), text


def test_servers_serve_images(video, build) -> None:
    server = [build / "programs/dit-server", video, "--port", "0", "--skip-verify"]
    done = subprocess.run(server, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "this bundle draws videos, and servers serve images" in done.stderr
