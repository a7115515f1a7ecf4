"""What a caption gives the denoiser: stacked once and not at every step, and the same at each."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dit_runtime.captions import Contexts

from dit_runtime import BundleError, Captions, Pipeline, UsageError
from dit_runtime.bundle import manifest

STEPS, MAX_BATCH = 4, 3  # of the fixture's bundle


@pytest.fixture
def stacks(monkeypatch) -> list[slice]:
    """The slices whose rows were stacked."""
    found: list[slice] = []
    stack = Contexts._groups

    def counted(self, own, samples):
        found.append(samples)
        return stack(self, own, samples)

    monkeypatch.setattr(Contexts, "_groups", counted)
    return found


def draw(pipe: Pipeline, count: int, **options: object) -> np.ndarray:
    rng = np.random.default_rng(count)
    captions = Captions(rng.standard_normal((count, 4, 3)), np.tri(count, 4, 1))
    negative = rng.standard_normal((1, 2, 3))
    return pipe.sample(captions=captions, negative=negative, steps=STEPS, seed=[*range(count)], **options)


def test_labels_beside_captions_are_refused(captioned) -> None:
    with Pipeline.load(captioned) as pipe, pytest.raises(UsageError, match="both labels and captions"):
        pipe.sample(0, captions=np.zeros((1, 4, 3)), guidance=1.0)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_run_that_fits_the_engine_stacks_once(captioned, stacks, monkeypatch, guidance) -> None:
    with Pipeline.load(captioned, threads=1) as pipe:
        kept = draw(pipe, MAX_BATCH, guidance=guidance)
        assert stacks == [slice(0, MAX_BATCH)]
        first = draw(pipe, 1, guidance=guidance)
        call = Contexts.__call__

        def forgetful(self, samples):
            self._held = None, {}
            return call(self, samples)

        monkeypatch.setattr(Contexts, "__call__", forgetful)
        stacks.clear()
        np.testing.assert_array_equal(draw(pipe, MAX_BATCH, guidance=guidance), kept)
        assert len(stacks) == STEPS
        np.testing.assert_array_equal(draw(pipe, 1, guidance=guidance), first)


def test_a_larger_run_stacks_each_part_as_it_comes(captioned, stacks) -> None:
    """Never two parts at a time: of 100 pictures by XL/2 that would be 6 GB."""
    with Pipeline.load(captioned, threads=1) as pipe:
        together = draw(pipe, 2 * MAX_BATCH, output="latents")
        assert stacks == [slice(0, MAX_BATCH), slice(MAX_BATCH, 2 * MAX_BATCH)] * STEPS
        table = {**pipe.manifest.graphs, "denoiser": replace(pipe.manifest.graphs["denoiser"], max_batch=100)}
        larger = Pipeline(pipe.folder, replace(pipe.manifest, graphs=table), pipe._engines)
        whole = draw(larger, 2 * MAX_BATCH, output="latents")
    np.testing.assert_allclose(together, whole, rtol=0, atol=1e-5)  # of values up to 10; kernels sum in another order
    assert np.abs(whole[0] - whole[MAX_BATCH]).max() > 1e-2  # parts that are mixed up would show


@pytest.mark.parametrize("end", ["inputs", "outputs"])
@pytest.mark.parametrize("shape", [["n", 5], ["n", "l", 3], ["n"], []])
def test_what_reads_captions_has_a_shape(captioned, tmp_path, end, shape) -> None:
    bundle = Path(shutil.copytree(captioned, tmp_path / "bundle"))
    assert manifest.read(bundle).caption_shape == (5, 3)
    table = json.loads((bundle / manifest.NAME).read_text())
    table["graphs"]["context"][end][0]["shape"] = shape
    (bundle / manifest.NAME).write_text(json.dumps(table))
    with pytest.raises(BundleError, match=r"context has the shape .* a row, expected 2 numbers"):
        manifest.read(bundle)
