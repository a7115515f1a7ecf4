"""A user's own conditions calibrate int8; the conditions of the gates are among what was seen."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from dit_export.cli import main
from dit_export.networks import Network, fixtures
from dit_export.precision import captions
from dit_export.precision.measure import Plan
from dit_export.precision.prompts import read
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError
from tests.precision.conftest import CHANNELS, TOKENS


def test_what_captions_reach_is_seen(captioned, tmp_path) -> None:
    """The input of a cross-attention's proj is a mean of the caption's values: as large as the caption is."""

    def reached(size: float | None) -> np.ndarray:
        own = np.random.default_rng(1).standard_normal((5, 3, CHANNELS)) * (size or 0)
        np.savez(tmp_path / "own.npz", captions=own, **{"negative.captions": own[:1]})
        prompts = None if size is None else read(tmp_path / "own.npz", captioned.network)
        layers = captioned.calibrate(Plan(pictures=8, steps=2), prompts).layers
        return np.array([layers[f"transformer_blocks.{n}.attn2.to_out.0"].largest.max() for n in range(2)])

    usual = reached(None)
    assert (reached(20.0) > 3 * usual).all()
    # The last pictures are of the fixtures: small captions of the user's own do not narrow what the gates need.
    assert (reached(0.01) > 0.5 * usual).all()


def test_all_captions_are_seen(captioned, tmp_path) -> None:
    """The last of five is the large one."""
    own = np.random.default_rng(1).standard_normal((5, 3, CHANNELS))
    largest = []
    for size in (1, 20):
        np.savez(tmp_path / "own.npz", captions=np.append(own[:4], size * own[4:], axis=0))
        prompts = read(tmp_path / "own.npz", captioned.network)
        layers = captioned.calibrate(Plan(pictures=12, steps=2), prompts).layers
        largest.append(layers["transformer_blocks.0.attn2.to_out.0"].largest.max())
    assert largest[1] > 3 * largest[0]


def test_fewer_captions_of_many_tokens() -> None:
    lengths = (77, 512), (77, 1024), (1356,)
    texts = [SimpleNamespace(prompts=[SimpleNamespace(tokens=length) for length in some]) for some in lengths]
    chosen = [captions.choose(text) for text in texts]
    assert chosen[0] == captions.CAPTIONS and [len(some) for some in chosen] == [20, 10, 7]
    assert len({len(caption) // 20 for caption in chosen[2]}) > 3  # short and long


def test_a_file_of_conditions(captioned, bundle, tmp_path) -> None:
    network, rng = captioned.network, np.random.default_rng(0)
    own, mask, empty = rng.standard_normal((2, 7, CHANNELS)), np.tri(2, 7, 4), rng.standard_normal((1, 3, CHANNELS))
    negative = {"negative.captions": empty, "negative.mask": np.tri(1, 3)}
    np.savez(tmp_path / "all.npz", captions=own, mask=mask, **negative)
    conditions = read(tmp_path / "all.npz", network)
    assert conditions.condition["captions"].shape == (2, TOKENS, CHANNELS)
    assert conditions.condition["mask"].sum(axis=1).tolist() == [5, 6] and conditions.negative["mask"].sum() == 1
    np.savez(tmp_path / "some.npz", captions=own)
    conditions = read(tmp_path / "some.npz", network)
    assert conditions.condition["mask"].sum(axis=1).tolist() == [7, 7]
    np.testing.assert_array_equal(conditions.negative["captions"], fixtures.null(network)["captions"])
    np.savez(tmp_path / "labels.npz", labels=np.arange(3))
    conditions = read(tmp_path / "labels.npz", bundle.network)
    assert conditions.condition["labels"].tolist() == [0, 1, 2] and conditions.negative["labels"].tolist() == [10]

    ports = [Port("a", "condition", "float32", (2,)), Port("b", "condition", "float32", (3,))]
    ports += [Port("x", "state", "float32", (4,)), Port("t", "time", "float32", ())]
    np.savez(tmp_path / "half.npz", a=np.ones((2, 2)), b=np.ones((2, 3)), **{"negative.b": np.ones((1, 3))})
    negative = read(tmp_path / "half.npz", Network(nn.Identity(), tuple(ports), null={"a": 0.5})).negative
    assert (negative["a"] == 0.5).all() and (negative["b"] == 1).all()

    known = "known: captions, mask, negative.captions, negative.mask"
    for arrays, said in (
        ({"captions": own, "masks": mask}, f"unknown array 'masks'; {known}"),
        ({"mask": mask}, "bad.npz lacks captions"),
        ({"captions": own[..., :5]}, r"captions has shape \(2, 7, 5\); expected \(rows, up to 20, 16\)"),
        ({"captions": own.astype(str)}, "captions is <U32; expected numbers"),
        ({"captions": own, "negative.captions": own}, "2 negative conditions; expected one"),
        ({"captions": own, "negative.mask": np.tri(1, 3)}, "bad.npz: guidance needs negative= with captions"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(UsageError, match=said):
            read(tmp_path / "bad.npz", network)
    (tmp_path / "text.npz").write_text("a red circle")
    whole = (tmp_path / "all.npz").read_bytes()
    directory = whole.rindex(b"PK\x01\x02")  # the last entry of its directory
    (tmp_path / "half.npz").write_bytes(whole[:1000])
    (tmp_path / "zip.npz").write_bytes(whole[: directory + 6] + b"\x63" + whole[directory + 7 :])  # asks for zip 9.9
    (tmp_path / "locked.npz").write_bytes(whole[: directory + 8] + b"\x01" + whole[directory + 9 :])
    np.save(tmp_path / "one.npy", own)
    for name, said in (
        ("text.npz", "not conditions as .npz"),
        ("half.npz", "not conditions as .npz"),
        ("zip.npz", "not conditions as .npz.*: zip file version 9.9"),
        ("locked.npz", r"not conditions as .npz.* is encrypted"),
        ("nowhere.npz", "nowhere.npz: no such file; expected conditions"),
        ("one.npy", "one.npy: one array without a name; expected conditions as .npz"),
    ):
        with pytest.raises(UsageError, match=said):
            read(tmp_path / name, network)
    with pytest.raises(UsageError, match=r"unknown array 'captions'; known: labels, negative\.labels"):
        read(tmp_path / "some.npz", bundle.network)


def test_conditions_are_for_int8(tmp_path, capsys) -> None:
    built = ["build", "S/8", "--synthetic", "-o", str(tmp_path / "x")]
    assert main([*built, "--conditions", "c.npz"]) == 2
    assert "conditions c.npz is for int8 and fp8; this build is fp32" in capsys.readouterr().err
