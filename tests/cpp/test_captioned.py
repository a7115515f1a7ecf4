"""A PixArt in C++: Python's pictures by captions, of the caller's own and by number."""

from __future__ import annotations

import numpy as np
import pytest

from dit_runtime import Captions
from tests.cpp.test_same_pictures import ENGINES, WAYS, load, same_latents, same_pictures

STEPS = 4
SHAPES = {1: (1, 120), 3: (3, 7)}  # captions and their tokens


@pytest.fixture
def written(tmp_path) -> dict[int, tuple[Captions, list[object]]]:
    """By how many they are: captions, and the flags that read them."""
    rng, found = np.random.default_rng(0), {}
    for count, shape in SHAPES.items():
        captions = Captions(rng.standard_normal((*shape, 32)).astype(np.float32), np.tri(*shape, shape[1] - 3))
        files = [tmp_path / f"captions-{count}.npy", tmp_path / f"mask-{count}.npy"]
        for file, part in zip(files, captions, strict=True):
            np.save(file, part)
        found[count] = captions, files
    return found


def flags(own: list[object], null: list[object]) -> list[object]:
    names = ("--captions", "--mask", "--negative", "--negative-mask")
    return [word for pair in zip(names, [*own, *null], strict=True) for word in pair]


@pytest.mark.parametrize(("engine", "threads"), WAYS)
def test_the_same_pictures(pixart, written, dit_generate, tmp_path, engine, threads) -> None:
    """More captions than a batch; one negative for all or one each; with and without guidance."""
    for count, guidance, nulls in ((1, 4.0, 1), (3, 4.0, 1), (3, 4.0, 3), (3, 1.0, 1)):
        (own, own_files), (null, null_files) = written[count], written[nulls]
        asked = {"captions": own, "negative": null, "steps": STEPS, "guidance": guidance, "seed": 5}
        given = [*flags(own_files, null_files), "--steps", STEPS, "--guidance", guidance, "--seed", 5]
        with load(pixart.bundle, engine, threads) as pipe:  # as new as the program, for each of its two runs
            latents = pipe.sample(**asked, output="latents")
            other = pipe.sample(**{**asked, "captions": own.embeddings}, output="latents")
        with load(pixart.bundle, engine, threads) as pipe:
            pictures = pipe.sample(**asked)
        for name in ("x.npy", "x.npz"):
            done = dit_generate(pixart.bundle, *given, "--backend", engine, "-o", tmp_path / name, threads=threads)
            assert done.returncode == 0, done.stderr
        assert same_latents(np.load(tmp_path / "x.npy"), latents), (count, guidance, nulls)
        assert not same_latents(np.load(tmp_path / "x.npy"), other)  # the mask is read
        assert same_pictures(np.load(tmp_path / "x.npz")["arr_0"], pictures)


@pytest.mark.parametrize("engine", ENGINES)
def test_examples_by_number(pixart, dit_generate, tmp_path, engine) -> None:
    given = ["--labels", 0, 3, "--steps", STEPS, "--backend", engine, "-o", tmp_path / "x.npy"]
    assert dit_generate(pixart.bundle, *given, "--json").returncode == 0
    with load(pixart.bundle, engine) as pipe:
        assert same_latents(np.load(tmp_path / "x.npy"), pipe.sample([0, 3], steps=STEPS, output="latents"))
    assert dit_generate(pixart.bundle, *given, "--low-memory").returncode == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_verify(pixart, dit_generate, engine) -> None:
    done = dit_generate(pixart.bundle, "--verify", "--backend", engine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "verified"


def test_mistakes(captioned, dit_generate, tmp_path) -> None:
    files = {name: tmp_path / f"{name}.npy" for name in ("right", "wide", "long", "flat", "mask")}
    for name, shape in (("right", (2, 4, 3)), ("wide", (2, 4, 5)), ("long", (1, 6, 3)), ("flat", (2, 4)), ("mask", 2)):
        np.save(files[name], np.ones(shape, np.float32))
    own, out = ["--captions", files["right"]], ["-o", tmp_path / "x.npy"]
    for given, said in (
        ([*own, "--labels", 1], "both --labels and --captions"),
        ([*own], "guidance needs negative captions"),
        (
            [*own, "--negative", files["right"], "--negative-mask", files["mask"]],
            "another shape than (captions, tokens)",
        ),
        (["--labels", 1, "--mask", files["mask"]], "mask.npy: a mask without --captions"),
        (["--labels", 1, "--negative", files["right"]], "negative captions without captions"),
        (["--captions", files["wide"]], "captions: 40 numbers; expected 24"),
        (["--captions", files["long"]], "captions are 1 of 6 tokens; expected one or more, of up to 5"),
        (["--captions", files["flat"]], "not text embeddings: expected the shape (captions, tokens, channels)"),
        (["--captions", tmp_path / "nowhere.npy"], "not text embeddings: it cannot be read"),
    ):
        done = dit_generate(captioned, *given, *out)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert dit_generate(captioned, *own, "--guidance", 1, *out).returncode == 0


def test_a_bundle_of_labels(meta, written, dit_generate, tmp_path) -> None:
    done = dit_generate(meta.bundle, "--captions", written[1][1][0], "-o", tmp_path / "x.npy")
    assert done.returncode == 2 and "this bundle takes labels, 0 to 11, and no captions" in done.stderr
