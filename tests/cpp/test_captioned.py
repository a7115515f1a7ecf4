"""A PixArt in C++: Python's pictures by captions and masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dit_runtime.conditions.condition import Condition
from tests.cpp.test_conditions import condition_flags
from tests.cpp.test_same_pictures import ENGINES, WAYS, load, same_latents, same_pictures

STEPS = 4
SHAPES = {1: (1, 120), 3: (3, 7)}  # captions and their tokens


@pytest.fixture
def conditions() -> dict[int, Condition]:
    """Captions with their masks, by how many they are."""
    rng = np.random.default_rng(0)
    return {
        count: {
            "captions": rng.standard_normal((*shape, 32)).astype(np.float32),
            "mask": np.tri(*shape, shape[1] - 3, dtype=np.float32),
        }
        for count, shape in SHAPES.items()
    }


@pytest.mark.parametrize(("engine", "threads"), WAYS)
def test_the_same_pictures(pixart, conditions, dit_generate, tmp_path: Path, engine, threads) -> None:
    """More captions than a batch; one negative for all or one each; with and without guidance."""
    with load(pixart.bundle, engine, threads) as pipe:
        for count, guidance, nulls in ((1, 4.0, 1), (3, 4.0, 1), (3, 4.0, 3), (3, 1.0, 1)):
            own, null = conditions[count], conditions[nulls]
            request = {"condition": own, "negative": null, "steps": STEPS, "guidance": guidance, "seed": 5}
            arguments = [*condition_flags(tmp_path, own, null), "--steps", STEPS, "--guidance", guidance, "--seed", 5]
            latents, pictures = pipe.sample(**request, output="latents"), pipe.sample(**request)
            unmasked = {**request, "condition": {"captions": own["captions"]}}
            other = pipe.sample(**unmasked, output="latents")
            for name in ("x.npy", "x.npz"):
                options = [*arguments, "--backend", engine, "-o", tmp_path / name]
                done = dit_generate(pixart.bundle, *options, threads=threads)
                assert done.returncode == 0, done.stderr
            assert same_latents(np.load(tmp_path / "x.npy"), latents), (count, guidance, nulls)
            assert not same_latents(np.load(tmp_path / "x.npy"), other)  # the mask is read
            assert same_pictures(np.load(tmp_path / "x.npz")["arr_0"], pictures)


@pytest.mark.parametrize("engine", ENGINES)
def test_verify(pixart, dit_generate, engine) -> None:
    done = dit_generate(pixart.bundle, "--verify", "--backend", engine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "verified"


def test_a_bundle_of_labels(meta, conditions, dit_generate, tmp_path) -> None:
    arguments = condition_flags(tmp_path, conditions[1])
    done = dit_generate(meta.bundle, "--labels", 1, *arguments, "-o", tmp_path / "x.npy")
    assert done.returncode == 2 and "condition has the unknown port 'captions'; known: labels" in done.stderr
