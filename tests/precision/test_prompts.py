"""A user's own captions calibrate int8; what the gates ask is among what was seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dit_runtime.captions import EXAMPLES, examples

from dit_export.cli import main
from dit_export.networks.spec import conditioned
from dit_export.precision.calibrate import Plan, calibrate
from dit_export.precision.prompts import read
from dit_runtime.errors import UsageError
from tests.once import once
from tests.precision.conftest import SPEC, unverified_bundle

TOKENS, CHANNELS = 20, 16
CAPTIONED = conditioned(replace(SPEC, caption_tokens=TOKENS, caption_channels=CHANNELS), "adaln-single")


@pytest.fixture(scope="module")
@once
def captioned(tmp_path_factory, one_thread) -> Path:
    with one_thread():
        return unverified_bundle(tmp_path_factory.mktemp("captioned-int8"), CAPTIONED)


def test_what_captions_reach_is_seen(captioned, tmp_path) -> None:
    """The input of a cross-attention's proj is a mean of the caption's values: as large as the caption is."""

    def reached(size: float | None) -> np.ndarray:
        own = np.random.default_rng(1).standard_normal((5, 3, CHANNELS)) * (size or 0)
        np.savez(tmp_path / "own.npz", captions=own, negative=own[:1])
        prompts = None if size is None else read(tmp_path / "own.npz", CAPTIONED)
        layers = calibrate(captioned, Plan(pictures=8, steps=2), lambda done, total: None, prompts).layers
        return np.array([layers[f"block {n} cross"].largest.max() for n in range(CAPTIONED.depth)])

    usual = reached(None)
    assert (reached(20.0) > 3 * usual).all()
    # The last pictures are of the made-up captions: small ones of the user's own do not narrow what the gates need.
    assert (reached(0.01) > 0.5 * usual).all()


def test_all_captions_are_seen(captioned, tmp_path) -> None:
    """The last of five is the large one."""
    own = np.random.default_rng(1).standard_normal((5, 3, CHANNELS))
    largest = []
    for size in (1, 20):
        np.savez(tmp_path / "own.npz", captions=np.append(own[:4], size * own[4:], axis=0))
        prompts = read(tmp_path / "own.npz", CAPTIONED)
        layers = calibrate(captioned, Plan(pictures=12, steps=2), lambda done, total: None, prompts).layers
        largest.append(layers["block 0 cross"].largest.max())
    assert largest[1] > 3 * largest[0]


def test_a_file_of_captions(tmp_path) -> None:
    rng = np.random.default_rng(0)
    own, mask, empty = rng.standard_normal((2, 7, CHANNELS)), np.tri(2, 7, 4), rng.standard_normal((1, 3, CHANNELS))
    np.savez(tmp_path / "all.npz", captions=own, mask=mask, negative=empty, negative_mask=np.tri(1, 3))
    found = read(tmp_path / "all.npz", CAPTIONED)
    assert found.captions.embeddings.shape == (2, TOKENS, CHANNELS)
    assert found.captions.mask.sum(axis=1).tolist() == [5, 6] and found.negative.mask.sum() == 1
    np.savez(tmp_path / "some.npz", captions=own)
    found = read(tmp_path / "some.npz", CAPTIONED)
    assert found.captions.mask.sum(axis=1).tolist() == [7, 7]
    np.testing.assert_array_equal(found.negative.embeddings, examples([EXAMPLES], TOKENS, CHANNELS).embeddings)

    for arrays, said in (
        ({"captions": own, "masks": mask}, "unknown array 'masks'; known: captions, mask, negative, negative_mask"),
        ({"mask": mask}, "no captions in it; got mask"),
        ({"captions": own[..., :5]}, r"captions have shape \(2, 7, 5\); expected \(captions, up to 20, 16\)"),
        ({"captions": own.astype(str)}, "captions are <U32; expected numbers"),
        ({"captions": own, "negative": own}, "2 negative captions; expected one"),
        ({"captions": own, "negative_mask": np.tri(1, 3)}, "negative_mask without negative"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(UsageError, match=said):
            read(tmp_path / "bad.npz", CAPTIONED)
    (tmp_path / "text.npy").write_text("a red circle")
    whole = (tmp_path / "all.npz").read_bytes()
    directory = whole.rindex(b"PK\x01\x02")  # the last entry of its directory
    (tmp_path / "half.npz").write_bytes(whole[:1000])
    (tmp_path / "zip.npz").write_bytes(whole[: directory + 6] + b"\x63" + whole[directory + 7 :])  # asks for zip 9.9
    (tmp_path / "locked.npz").write_bytes(whole[: directory + 8] + b"\x01" + whole[directory + 9 :])
    for path, spec, said in (
        (tmp_path / "text.npy", CAPTIONED, "not captions as .npy or .npz"),
        (tmp_path / "half.npz", CAPTIONED, "not captions as .npy or .npz"),
        (tmp_path / "zip.npz", CAPTIONED, "not captions as .npy or .npz: zip file version 9.9"),
        (tmp_path / "locked.npz", CAPTIONED, "not captions as .npy or .npz: .* is encrypted"),
        (tmp_path / "nowhere.npy", CAPTIONED, "nowhere.npy: no such file; expected captions"),
        (tmp_path / "some.npz", SPEC, "this network takes labels; leave them out"),
    ):
        with pytest.raises(UsageError, match=said):
            read(path, spec)


def test_captions_are_for_int8(tmp_path, capsys) -> None:
    built = ["build", "S/8", "--synthetic", "--conditioning", "adaln-single", "-o", str(tmp_path / "x")]
    assert main([*built, "--captions", "c.npy"]) == 2
    assert "captions c.npy is for int8 and fp8; this build is fp32" in capsys.readouterr().err
