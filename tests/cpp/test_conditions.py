"""Conditions by port in C++: Python's states on hand-made bundles of every kind, and mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dit_runtime.conditions.condition import Condition
from tests.cpp.test_same_pictures import ENGINES, load, same_latents
from tests.handmade import module

STEPS = 4


def condition_flags(folder: Path, condition: Condition, negative: Condition | None = None) -> list[object]:
    """The flags that read these arrays, each of a file of its own."""
    flags: list[object] = []
    for name, arrays in (("condition", condition), ("negative-condition", negative or {})):
        for port, array in arrays.items():
            np.save(folder / f"{name}-{port}.npy", array)
        files = [f"{port}={folder / f'{name}-{port}.npy'}" for port in arrays]
        flags += [f"--{name}", *files] if files else []
    return flags


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    for kind in ("captioned", "wave", "video", "free"):
        module("make_bundle").make(folder / kind, kind)
    return {path.name: path for path in folder.iterdir()}


def arrays(count: int) -> dict[str, tuple[Condition, Condition | None]]:
    """Return, per kind, a condition of `count` rows and an optional negative. The negative fills in for a missing
    constant of the bundle, or replaces the constant."""
    rng = np.random.default_rng(count)

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    masked = {"captions": floats(count, 4, 3), "mask": np.tri(count, 4, 1)}
    return {
        "captioned": (masked, {"captions": floats(1, 2, 3)}),
        "wave": ({"words": floats(count, 2, 4), "pooled": floats(count, 5)}, {"pooled": floats(count, 5)}),
        "video": ({"labels": np.arange(count) % 3, "rate": floats(count)}, None),
        "free": ({}, None),
    }


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["captioned", "wave", "video", "free"])
def test_the_same_states(bundles, dit_generate, tmp_path, kind, engine) -> None:
    """More rows than a batch, with and without guidance, and what a row more or less changes is seen."""
    for count, guidance in ((1, 3.0), (5, 3.0), (5, 1.0)):
        condition, negative = arrays(count)[kind]
        seeds = list(range(count))
        arguments = [*condition_flags(tmp_path, condition, negative), "--steps", STEPS, "--guidance", guidance]
        options = [*arguments, "--seed", *seeds, "--backend", engine, "-o", tmp_path / "x.npy"]
        done = dit_generate(bundles[kind], *options)
        assert done.returncode == 0, done.stderr
        request = {"condition": condition, "negative": negative, "steps": STEPS, "guidance": guidance}
        with load(bundles[kind], engine) as pipe:
            expected = pipe.sample(**request, seed=seeds, output="latents")
            other = pipe.sample(**request, seed=[seed + 1 for seed in seeds], output="latents")
        assert same_latents(np.load(tmp_path / "x.npy"), expected), (count, guidance)
        assert not same_latents(np.load(tmp_path / "x.npy"), other)


def test_an_archive_says_the_same(bundles, dit_generate, tmp_path) -> None:
    condition, negative = arrays(3)["wave"]
    np.savez(tmp_path / "condition.npz", **condition)
    np.savez(tmp_path / "negative.npz", **negative)
    archives = ["--condition", tmp_path / "condition.npz", "--negative-condition", tmp_path / "negative.npz"]
    for name, arguments in (("a", condition_flags(tmp_path, condition, negative)), ("b", archives)):
        done = dit_generate(bundles["wave"], *arguments, "--steps", STEPS, "-o", tmp_path / f"{name}.npy", "--json")
        assert done.returncode == 0 and '"shape": [3, 6]' in done.stdout, done.stderr
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


def test_latents_say_how_many_pictures(bundles, dit_generate, tmp_path) -> None:
    """The latents set the number of pictures where nothing conditions the network, as in Python."""
    latents = np.random.default_rng(3).standard_normal((3, 2, 4, 4)).astype(np.float32)
    np.save(tmp_path / "latents.npy", latents)
    options = ["--latents", tmp_path / "latents.npy", "--steps", STEPS, "-o", tmp_path / "x.npy"]
    done = dit_generate(bundles["free"], *options)
    assert done.returncode == 0, done.stderr
    with load(bundles["free"], "onnxruntime") as pipe:
        expected = pipe.sample(latents=latents, steps=STEPS, output="latents")
    assert same_latents(np.load(tmp_path / "x.npy"), expected)


def test_labels_beside_other_ports(bundles, dit_generate, tmp_path) -> None:
    condition = {"rate": np.array([0.5, 2], np.float32)}
    for name, arguments in (
        ("a", ["--labels", 0, 2, *condition_flags(tmp_path, condition)]),
        ("b", condition_flags(tmp_path, {**condition, "labels": np.array([0, 2])})),
    ):
        done = dit_generate(bundles["video"], *arguments, "--steps", STEPS, "-o", tmp_path / f"{name}.npy")
        assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["captioned", "wave", "video", "free"])
def test_verify(bundles, dit_generate, kind, engine) -> None:
    done = dit_generate(bundles[kind], "--verify", "--backend", engine)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "verified", done.stdout + done.stderr


def test_mistakes(bundles, dit_generate, tmp_path) -> None:
    right, wide, long = (np.ones(shape, np.float32) for shape in ((2, 4, 3), (2, 4, 5), (1, 6, 3)))
    out = ["-o", tmp_path / "x.npy"]
    for condition, negative, message in (
        ({}, None, "condition lacks captions; expected an array for each of captions, mask"),
        ({"captions": right}, None, "guidance needs a negative with captions"),
        ({"captions": right}, {"captions": np.ones((3, 1, 3))}, "negative has 3 rows; expected one, or one for each"),
        ({"captions": right, "mask": np.ones(2)}, None, "expected [2, 4] of 0 and 1"),
        ({"captions": right, "caption": right}, None, "unknown port 'caption' (did you mean \"captions\"?)"),
        ({"captions": wide}, None, "condition: captions has shape [2, 4, 5]; expected [rows, up to 5, 3]"),
        ({"captions": right.reshape(2, 12)}, None, "captions has shape [2, 12]; expected [rows, up to 5, 3]"),
        ({"captions": right.reshape(2, 2, 2, 3)}, None, "captions has shape [2, 2, 2, 3]; expected"),
        ({"captions": right, "mask": np.ones((2, 2, 2))}, None, "mask has shape [2, 2, 2]; expected [2, 4] of 0 and 1"),
        ({"captions": long}, None, "captions has shape [1, 6, 3]; expected [rows, up to 5, 3]"),
        ({"captions": np.float32(1)}, None, "not a condition: expected numbers in rows"),
    ):
        done = dit_generate(bundles["captioned"], *condition_flags(tmp_path, condition, negative), *out)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    flags = condition_flags(tmp_path, {"captions": right})
    assert dit_generate(bundles["captioned"], *flags, "--guidance", 1, *out).returncode == 0
    done = dit_generate(bundles["captioned"], "--labels", 1, *out)
    assert done.returncode == 2 and "this bundle takes captions, mask, and no labels" in done.stderr
