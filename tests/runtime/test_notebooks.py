"""The output of a notebook: a line for each object, and pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dit_export.verify.check import Built
from dit_runtime import Request, UsageError, show
from dit_runtime.verify import Figure


def test_objects_are_a_line(opened) -> None:
    pipe = opened()
    title = "tiny at 32 px, fp32 on onnxruntime"
    assert repr(pipe) == f"<Pipeline labels: {title}>"
    assert repr(pipe.manifest) == f"<Manifest of {title}>"
    assert repr(opened("sizes").manifest) == "<Manifest of tiny at 32, 32x64 px, fp32 on onnxruntime>"
    run = pipe.run(Request([1, 2], steps=3))
    run.step()
    assert repr(run) == f"<Run after step 1 of 3: {run.rows} rows a sample>" and run.rows == 2


def test_a_request_is_what_it_states() -> None:
    assert repr(Request()) == "Request()"
    request = Request(["cat", 3], steps=9, seed=np.arange(2), condition={"text": np.zeros((2, 3), np.float32)})
    assert repr(request) == (
        "Request(labels=['cat', 3], condition={'text': <float32 [2, 3]>}, steps=9, seed=<int64 [2]>)"
    )
    assert len(repr(Request(latents=[0.0] * 10_000, prompt="x" * 10_000))) < 300


def test_a_verdict_is_a_line(tmp_path) -> None:
    figures = [Figure("run", "a", 1.0, 2.0), Figure("run", "b", 3.0, 2.0)]
    assert repr(Built(tmp_path, [], figures[:1], None, None)) == f"<Built {tmp_path}: 1 checks passed>"
    assert repr(Built(tmp_path, [], figures, None, None)) == f"<Built {tmp_path}: 1 of 2 checks failed>"


@pytest.mark.parametrize(
    ("shape", "size", "text"),
    [
        ((5, 4, 3), (4, 5), "<1 picture of 5 x 4 pixels>"),
        ((3, 5, 4, 3), (8, 10), "<3 pictures of 5 x 4 pixels>"),
        ((2, 6, 5, 4, 3), (24, 10), "<2 videos of 5 x 4 pixels>"),  # a row of frames each
    ],
)
def test_pictures(shape: tuple[int, ...], size: tuple[int, int], text: str) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    shown = show(pictures)
    assert repr(shown) == text
    with Image.open(io.BytesIO(shown._repr_png_())) as image:
        assert image.size == size
        np.testing.assert_array_equal(np.asarray(image)[:5, :4], pictures.reshape(-1, 5, 4, 3)[0])
    assert type(pictures) is np.ndarray  # results stay arrays: only what `show` returns is drawn


@pytest.mark.parametrize(
    "array", [np.zeros((2, 4, 8, 8), np.float32), np.zeros((8, 8), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_latents_are_no_pictures(array) -> None:
    with pytest.raises(UsageError, match=r"expected uint8 pictures"):
        show(array)
