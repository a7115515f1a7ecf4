"""Runs that start from a picture: where they start, what a mask keeps, and what requests are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from dit_runtime import Pipeline, Request, UsageError, verify
from dit_runtime.backends import ort
from dit_runtime.bundle import manifest
from dit_runtime.bundle.parsing import parse
from dit_runtime.errors import EngineError
from dit_runtime.images import to_unit
from dit_runtime.sampling.noise import Noise
from dit_runtime.sampling.process import SOLVERS
from dit_runtime.sampling.start import Start, first_step
from dit_runtime.serve import Batcher, preview
from tests.runtime.test_loops import WHOLE, Host

SIDE = 32
OPTIONS = {"steps": 5, "guidance": 3.0, "seed": [4, 5], "output": "latents"}


def pictures(count: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def mask() -> np.ndarray:
    """Left of the middle is drawn anew; a grey place and those where no cell begins count for nothing."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, : SIDE // 2], mask[16:24, 16:24], mask[:8, 17:24], mask[9:16, 24:] = 255, 127, 255, 255
    return mask


def drawn(pipe: Pipeline) -> tuple[np.ndarray, np.ndarray]:
    """Return latents of the pictures and noise, as the seeds of OPTIONS give them."""
    encoded, streams = pipe.engines.encode_pictures(to_unit(pictures())), [Noise(seed) for seed in OPTIONS["seed"]]
    first, noise = (np.concatenate([stream.normal((1, 2, 4, 4)) for stream in streams]) for _ in range(2))
    return encoded["mean"] + np.exp(encoded["logvar"] / 2) * first, noise


@pytest.fixture
def pipe(opened) -> Pipeline:
    return opened("pictured")


@pytest.mark.parametrize(
    ("steps", "strength", "first"),
    [(10, 0.3, 7), (10, 0.9, 1), (4, 0.6, 1), (50, 0.01, 49), (1, 0.2, 0), (28, 0.6, 11), (5, 1, 0), (5, None, 2)],
)
def test_the_steps_that_are_left_out(steps, strength, first) -> None:
    """As StableDiffusion3Img2ImgPipeline.get_timesteps, rounding included: 28 - 28 · 0.6 is 11.2."""
    assert first_step(steps, strength) == first


def test_a_run_starts_with_the_noise_of_its_first_step(pipe) -> None:
    """Each sample's stream gives its latents first, then the noise."""
    request = Request([1, 2], image=pictures(), strength=0.5, **OPTIONS)
    run = pipe.run(request)
    checked = request.check(pipe.manifest)
    bar = pipe.manifest.process.alpha_bar[int(checked.timesteps[0])]
    latents, noise = drawn(pipe)
    np.testing.assert_allclose(run.state, np.sqrt(bar) * latents + np.sqrt(1 - bar) * noise, rtol=0, atol=1e-6)
    assert run.steps == 3 and checked.first == 2 and len(checked.timesteps) == 3
    whole = Request([1, 2], **OPTIONS).check(pipe.manifest)
    assert checked.timesteps.tolist() == whole.timesteps[2:].tolist()


@pytest.mark.parametrize("solver", [name for name, facts in SOLVERS.items() if "noise" in facts["processes"]])
def test_what_a_mask_keeps(pipe, solver) -> None:
    """After each evaluation black places have the picture's latents with the noise of the next one, at last none."""
    request = Request([1, 2], image=pictures(), strength=0.7, mask=mask(), solver=solver, **OPTIONS)
    checked = request.check(pipe.manifest)
    start = Start(pipe.engines.encode_pictures(checked.image), (2, 2, 4, 4), checked.draw, checked.levels)
    run, free = pipe.run(request), pipe.run(replace(request, mask=None))
    anew = np.zeros((4, 4), bool)
    anew[:, :2] = True
    assert (checked.mask[0, 0] == 1).tolist() == anew.tolist()
    more = True
    while more:
        more = run.step()
        free.step()
        expected = start.at(run.done)
        np.testing.assert_array_equal(run.state[:, :, ~anew], expected[:, :, ~anew])
        assert not np.isclose(run.state[:, :, anew], expected[:, :, anew]).any()
    assert not np.allclose(run.state, free.state)
    np.testing.assert_allclose(run.state[:, :, ~anew], drawn(pipe)[0][:, :, ~anew], rtol=0, atol=1e-6)


def test_one_picture_for_all(pipe) -> None:
    """It is encoded once, and each sample draws its own latents of it."""
    one = pictures(1)
    got = pipe.sample([1, 2], image=one[0], mask=mask(), **OPTIONS)
    np.testing.assert_array_equal(
        got, pipe.sample([1, 2], image=one.repeat(2, 0), mask=mask()[None].repeat(2, 0), **OPTIONS)
    )
    assert not np.allclose(got[0, :, :, 2:], got[1, :, :, 2:])
    alone = pipe.sample([2], image=one / 255, mask=mask() / 255, **OPTIONS | {"seed": [5]})
    np.testing.assert_allclose(got[1:], alone, rtol=0, atol=1e-6)


def test_all_of_the_steps_start_in_noise(pipe) -> None:
    """A strength of 1 leaves out none; of a noise process, some of the picture is there."""
    run = pipe.run(Request([1, 2], image=pictures(), strength=1.0, **OPTIONS))
    assert run.steps == 5
    other = pipe.run(Request([1, 2], image=pictures(seed=1), strength=1.0, **OPTIONS))
    assert 0 < np.abs(run.state - other.state).max() < 0.1


def test_on_a_device(opened, monkeypatch) -> None:
    """The matrices are of the steps that are left; a mask takes the solver on the host."""
    request = Request([1, 2], image=pictures(), strength=0.7, solver="dpm++", **OPTIONS)
    expected = opened("pictured").run(request).result()
    monkeypatch.setattr(ort, "OrtEngine", Host)
    run = opened("pictured").run(request)
    with pytest.raises(UsageError, match="state stays on a device"):
        run.ask()
    assert np.abs(run.result() - expected).max() < WHOLE and run.done == 4
    assert opened("pictured").run(replace(request, mask=mask())).ask() is not None


def test_a_batcher_draws_it(handmade) -> None:
    request = Request([1, 2], image=pictures(), strength=0.7, mask=mask(), **OPTIONS)
    with Pipeline.load(handmade("pictured"), threads=1) as pipe:
        run, previews = pipe.run(request, host=True), {}
        while ask := run.ask():
            answer = pipe.engines.denoise(ask.state, lambda _, samples, groups, ask=ask: ask.inputs(samples), run.done)
            run.tell(*answer)
            level = request.check(pipe.manifest).levels[run.done - 1]
            previews[run.done] = preview.pictures(pipe, level, ask.state, answer[0])
        expected = run.result()
    events = []
    batcher = Batcher(Pipeline.load(handmade("pictured"), threads=1))
    try:
        ticket = batcher.submit(request, listener=lambda *row: events.append(row), previews=2)
        np.testing.assert_array_equal(ticket.future.result(60), expected)
    finally:
        batcher.close()
    assert [row[:2] for row in events] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    drawn_at = {row[0]: row[2] for row in events if row[2] is not None}
    assert drawn_at.keys() == {1, 2}
    for done, pictures_there in drawn_at.items():
        np.testing.assert_array_equal(pictures_there, previews[done])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"strength": 0.5}, "got strength without an image to start from"),
        ({"mask": np.zeros((32, 32))}, "got mask without an image to start from"),
        ({"image": pictures(), "latents": np.zeros((2, 2, 4, 4))}, "got both an image and latents"),
        ({"image": pictures(), "strength": 0}, "strength is 0; expected a number above 0, up to 1"),
        ({"image": pictures(), "strength": 1.5}, "strength is 1.5; expected"),
        ({"image": pictures(), "strength": float("nan")}, "strength is nan; expected"),
        ({"image": pictures(), "strength": "much"}, "strength is 'much'; expected"),
        ({"image": pictures(), "strength": 1e-320}, "of 5 steps it leaves none"),
        (
            {"image": pictures()[:, 1:]},
            r"image has shape \[2, 31, 32, 3\]; expected \[32, 32, 3\], or one for each sample",
        ),
        ({"image": pictures()[..., 0]}, r"image has shape \[2, 32, 32\]; expected"),
        ({"image": pictures(3)}, "image has 3 pictures; expected one, or one for each of 2 samples"),
        ({"image": pictures(0)}, r"image has shape \[0, 32, 32, 3\]; expected"),
        ({"image": pictures() + 1.0}, "image holds float64; expected uint8, or floats from 0 to 1"),
        ({"image": np.full((32, 32, 3), np.nan)}, "image holds float64; expected"),
        ({"image": pictures().astype(np.int64)}, "image holds int64; expected"),
        ({"image": "cat.png"}, "image is <U7; expected numbers"),
        ({"image": pictures(), "mask": np.zeros((31, 32))}, r"mask has shape \[31, 32\]; expected"),
        ({"image": pictures(), "mask": np.zeros((3, 32, 32))}, "mask has 3 pictures; expected one"),
        ({"image": pictures(), "mask": mask().astype(np.float32)}, "mask holds float32 that are not from 0 to 1"),
        ({"image": pictures(), "mask": mask().astype(np.int64)}, "mask holds int64 that are not from 0 to 1"),
        ({"image": pictures(), "mask": np.full((32, 32), np.nan)}, "mask holds float64 that are not from 0 to 1"),
    ],
)
def test_what_is_refused(handmade, fields, words) -> None:
    with pytest.raises(UsageError, match=words):
        Request([1, 2], **OPTIONS | fields).check(manifest.read(handmade("pictured")))


def test_without_an_encoder(handmade) -> None:
    with pytest.raises(UsageError, match="takes no pictures, for it has no encoder; build it with --encoder"):
        Request([1, 2], image=pictures(), **OPTIONS).check(manifest.read(handmade("labels")))


def test_an_encoder_needs_a_decoder(handmade) -> None:
    """Its pictures in the reference are those of the decoder: verification would have none."""
    table = json.loads((handmade("pictured") / manifest.NAME).read_text(encoding="utf-8"))
    table["stages"] = [stage for stage in table["stages"] if stage["runs"] != "end"]
    with pytest.raises(ValueError, match="stage encoder: got no stage that runs 'end', expected one"):
        parse(table)


def test_latents_that_are_not_finite(pipe, monkeypatch) -> None:
    bad = np.full((1, 2, 4, 4), np.nan, np.float32)
    monkeypatch.setattr(pipe.engines, "run", lambda *_: {"mean": bad})
    with pytest.raises(EngineError, match="the encoder's latents hold values that are not finite"):
        pipe.engines.encode_pictures(to_unit(pictures(1)))


def test_verification_asks_the_encoder(pipe) -> None:
    """Its figures have the limits of its precision, and break with its answer."""
    figures = {figure.metric: figure for figure in verify.verify(pipe) if figure.stage == "encoder"}
    assert figures.keys() == {"mean of pictures, PSNR in dB", "logvar of pictures, PSNR in dB"}
    assert all(figure.passed and figure.limit == 60 for figure in figures.values())
    reference = verify.load_reference(pipe.folder, pipe.manifest)
    moved = {name: values + np.float32(0.05) for name, values in reference.encoded.items()}
    wrong = reference._replace(encoded=moved)
    checks = verify.judge(pipe.manifest, wrong, verify.replay(pipe, wrong))
    assert [figure.passed for figure in checks if figure.stage == "encoder"] == [False, False]
