"""Pictures and videos as arrays and files."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from dit_runtime import images
from dit_runtime.cli import main
from dit_runtime.errors import UsageError

VIDEOS = np.random.default_rng(0).integers(0, 256, (2, 11, 12, 14, 3), dtype=np.uint8)


def test_channels_come_last() -> None:
    video = np.random.default_rng(1).random((2, 3, 5, 4, 6))
    got = images.to_uint8(video)
    assert got.shape == (2, 5, 4, 6, 3)
    for frame in range(5):
        np.testing.assert_array_equal(got[:, frame], images.to_uint8(video[:, :, frame]))


def test_a_grid_of_videos_has_a_row_each() -> None:
    sheet = images.grid(VIDEOS)
    assert sheet.shape == (2 * 12, 11 * 14, 3)
    np.testing.assert_array_equal(sheet[12:, 14:28], VIDEOS[1, 1])
    np.testing.assert_array_equal(images.still(VIDEOS[0]), images.grid(VIDEOS[0]))
    assert images.still(VIDEOS[0, 0]) is not None and images.still(VIDEOS[0, 0]).shape == (12, 14, 3)


def test_the_similarity_of_videos_is_that_of_their_frames() -> None:
    ours, theirs = VIDEOS[0], np.roll(VIDEOS[0], 1, axis=2)
    frames = [images.ssim(*pair) for pair in zip(ours, theirs, strict=True)]
    assert images.ssim(ours, theirs) == pytest.approx(np.mean(frames), abs=1e-12)
    assert images.ssim(ours, np.roll(ours, 1, axis=0)) < 0.9 < images.ssim(ours, ours)


def test_a_folder_has_a_png_for_each_picture_or_frame(tmp_path) -> None:
    images.write_folder(tmp_path / "frames", VIDEOS)
    names = [f"{video}-{frame:02}.png" for video in range(2) for frame in range(11)]
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == names
    assert (tmp_path / "frames" / "1-03.png").read_bytes() == images.png(VIDEOS[1, 3])
    images.write_folder(tmp_path / "pictures", VIDEOS[0])
    assert (tmp_path / "pictures" / "03.png").read_bytes() == images.png(VIDEOS[0, 3])


PYAV = r"needs PyAV: pip install 'dit-runtime[video]', or pass -o FOLDER for PNGs"


def test_an_mp4_without_pyav_names_the_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=re.escape(PYAV)):
        images.write_mp4(tmp_path / "a.mp4", VIDEOS, 25)


@pytest.mark.parametrize(
    ("rate", "av", "words"),
    [("25", None, PYAV), ("0", sys, "0 frames a second; expected 1 or more"), ("-1", sys, "-1 frames a second")],
)
def test_an_mp4_is_refused_before_the_sampling(tmp_path, monkeypatch, capsys, rate, av, words) -> None:
    """Before the bundle is looked at, which is none here."""
    monkeypatch.setitem(sys.modules, "av", av)
    file = str(tmp_path / "a.mp4")
    assert main(["sample", str(tmp_path), "--prompt", "a cat", "--fps", rate, "-o", file]) == 2
    assert f"a.mp4: {words}" in capsys.readouterr().err
