"""dit-generate and dit-run draw and verify the same sizes of a bundle."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dit_runtime import Pipeline, verify
from tests.cpp.test_same_pictures import same_pictures

OPTIONS = ["--labels", 1, 3, "--steps", 3, "--seed", 5]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("size", ["32", "32x64"])
def test_the_same_pictures(handmade, dit_generate, tmp_path, engine, size) -> None:
    file = tmp_path / "pictures.npz"
    done = dit_generate(handmade("sizes"), *OPTIONS, "--size", size, "--backend", engine, "-o", file)
    assert done.returncode == 0, done.stderr
    with Pipeline.load(handmade("sizes"), threads=1) as pipe, np.load(file) as pictures:
        assert same_pictures(pictures["arr_0"], pipe.sample([1, 3], steps=3, seed=5, size=size))


def test_verify_says_what_python_says(handmade, dit_generate) -> None:
    with Pipeline.load(handmade("sizes"), threads=1) as pipe:
        expected = [figure.name for figure in verify.verify(pipe)]
    said = json.loads(dit_generate(handmade("sizes"), "--verify", "--json").stdout)
    assert said["passed"] and [check["name"] for check in said["checks"]] == expected
    assert "32x64: denoiser-32x64: prediction, rel-L2" in expected


def test_a_size_that_is_not_there(handmade, dit_generate) -> None:
    done = dit_generate(handmade("sizes"), *OPTIONS, "--size", 64)
    assert done.returncode == 2 and "size 64 is not in this bundle; it has 32, 32x64" in done.stderr
