"""The length of PyTorch's run in reference.npz, the types that it stores, and what a free run must keep to."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dit_export.verify.reference import choose_frames, sample_count, save_reference, step_count
from dit_runtime.sampling.process import Process, Sampler
from dit_runtime.verify import TOLERANCES, Reference, Replay
from dit_runtime.verify.judge import _run


@pytest.mark.parametrize(("latent_size", "steps"), [(32, 10), (64, 8), (96, 4), (128, 4)])
def test_a_run_is_long_enough_to_be_one(latent_size, steps):
    shape = (4, latent_size, latent_size)
    assert step_count(shape, Process(), pixels=8) == steps
    velocity = Process(prediction="velocity", sampler=Sampler(solver="heun"))
    assert step_count(shape, velocity, pixels=8) == steps // 2  # each of two evaluations


@pytest.mark.parametrize(("pixels", "steps"), [(0, 10), (8, 8), (16, 4)])
def test_larger_pictures_leave_room_for_fewer_steps(pixels, steps):
    assert step_count((4, 64, 64), Process(), pixels) == steps


@pytest.mark.parametrize(
    ("shape", "pictures", "samples", "frames"),
    [
        ((16, 128, 128), (2, 1024, 1024, 3), 2, []),
        ((8, 3, 4, 6), (2, 17, 32, 48, 3), 2, []),
        ((128, 21, 16, 22), (1, 161, 512, 704, 3), 1, [0, 6, 11, 17]),  # LTX-Video's default: 477 MB otherwise
    ],
)
def test_a_large_video_has_one_sample_and_some_frames(shape, pictures, samples, frames):
    assert sample_count(shape) == samples
    chosen = choose_frames(np.broadcast_to(np.uint8(0), pictures))
    assert chosen[:4].tolist() == frames
    if frames:
        assert len(chosen) == 29 and chosen[-1] == pictures[1] - 1
        assert samples * 20 * np.prod(shape) * 5 + len(chosen) * 512 * 704 * 3 < 130e6


def test_frames_of_a_video_are_compared_with_the_same_ones(tmp_path):
    videos = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 1, 1, 3)
    frames = reference(images=videos[:, [0, 4]], frames=np.array([0, 4]))
    np.testing.assert_array_equal(frames.shown(videos), frames.images)
    np.testing.assert_array_equal(reference().shown(videos), videos)
    save_reference(tmp_path, frames, (), {})
    with np.load(tmp_path / "reference.npz") as arrays:
        assert arrays["frames"].tolist() == [0, 4]


def reference(**fields) -> Reference:
    empty = {name: np.empty(0, np.float32) for name in Reference._fields}
    return Reference(**empty | {"condition": {}, "negative": None, "encoded": {}} | fields)


def test_conditions_are_float16_only_where_that_is_exact(tmp_path):
    condition = {"exact": np.array([[0.5, 1.0]], np.float32), "third": np.array([[1 / 3]], np.float32)}
    negative = {"large": np.array([1e6], np.float32), "class": np.array([7])}
    save_reference(tmp_path, reference(condition=condition, negative=negative), (), {})
    with np.load(tmp_path / "reference.npz") as arrays:
        assert arrays["condition.exact"].dtype == np.float16
        for name, rows in (("condition.third", condition["third"]), *((f"null.{n}", r) for n, r in negative.items())):
            assert arrays[name].dtype == rows.dtype and np.array_equal(arrays[name], rows)


@pytest.mark.parametrize(
    ("moved", "precision", "passes"),
    [
        ([0, 1], "int8", True),  # a decision of the network, that rounding turned
        ([0, 1], "fp32", False),
        ([1, 1], "int8", False),  # an error of the loop
        ([0, np.nan], "int8", False),
    ],
)
def test_below_fp32_the_nearest_sample_counts(moved, precision, passes):
    latents = np.random.default_rng(0).normal(size=(2, 2, 4, 8, 8)).astype(np.float32)
    away = np.roll(latents[1], 1, axis=-1) - latents[1]
    got = latents[1] + away * np.array(moved, np.float32).reshape(-1, 1, 1, 1)
    answers = Replay(np.empty(0), [], [got], None, None, {}, [])
    original = reference(timesteps=np.zeros(1), latents=latents)
    (figure,) = _run(SimpleNamespace(end=None), original, answers, TOLERANCES[precision])
    assert figure.passed == passes
