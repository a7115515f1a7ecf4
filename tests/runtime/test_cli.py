"""`dit-run` with conditions of every kind: arrays by port from files, and what is refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dit_runtime import Request
from dit_runtime.bundle import manifest
from dit_runtime.bundle.summary import summary
from dit_runtime.cli import main

CAPTIONS = np.random.default_rng(1).standard_normal((2, 4, 3)).astype(np.float32)
NEGATIVE = np.random.default_rng(2).standard_normal((1, 2, 3)).astype(np.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("captions.npy", CAPTIONS)
    np.save("mask.npy", np.tri(2, 4))
    np.save("negative.npy", NEGATIVE)
    np.savez("condition.npz", captions=CAPTIONS, mask=np.tri(2, 4))
    np.savez("words.npz", captions=np.array([["a"]]))
    Path("broken.npz").write_bytes(b"PK\x03\x04")
    return tmp_path


def sample(bundle: Path, *options: str) -> int:
    return main(["sample", str(bundle), "--steps", "3", "-o", "x.npy", "--threads", "1", *options])


@pytest.mark.parametrize(
    "options", [["info", "BUNDLE"], ["info", "BUNDLE", "--json"], ["--help"], ["verify", "BUNDLE"]]
)
def test_nobody_reads_the_output(handmade, options) -> None:
    """Quiet, with the code of a program that SIGPIPE ended: in `dit-run info BUNDLE | head` nothing failed."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [str(handmade("captioned")) if option == "BUNDLE" else option for option in options]
    command = [sys.executable, "-m", "dit_runtime.cli", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0 if options == ["--help"] else 141, "")  # argparse passes over it


@pytest.mark.parametrize("condition", [["captions=captions.npy", "mask=mask.npy"], ["condition.npz"]], ids=str)
def test_conditions_from_files(opened, handmade, folder, condition) -> None:
    assert (
        sample(handmade("captioned"), "--condition", *condition, "--negative-condition", "captions=negative.npy") == 0
    )
    expected = opened("captioned").sample(
        condition={"captions": CAPTIONS, "mask": np.tri(2, 4)},
        negative={"captions": NEGATIVE},
        steps=3,
        output="latents",
    )
    np.testing.assert_array_equal(np.load("x.npy"), expected)


def test_labels_and_the_rest_of_the_condition(opened, handmade, folder) -> None:
    np.save("rate.npy", np.array([0.5, 2.0]))
    assert sample(handmade("video"), "--labels", "0", "2", "--condition", "rate=rate.npy") == 0
    expected = opened("video").sample([0, 2], condition={"rate": np.array([0.5, 2])}, steps=3, output="latents")
    np.testing.assert_array_equal(np.load("x.npy"), expected)


def test_policies_and_caches(opened, handmade, folder, capsys) -> None:
    """Flags are fields of a request; the JSON says what the network evaluated for each sample."""
    interval = ["--guidance-interval", "0", "0.8", "--guidance-policy", "apg", "eta=0.5", "--steps", "9"]
    cache = ["--cache", "taylorseer", "--cache-interval", "3", "--max-order", "0", "--disable-cache-before-step", "1"]
    cache += ["--disable-cache-after-step", "-2"]
    fields = {"steps": 9, "guidance_interval": (0, 0.8), "guidance_policy": "apg eta=0.5", "output": "latents"}
    chosen = {"cache_interval": 3, "max_order": 0, "disable_cache_before_step": 1, "disable_cache_after_step": -2}
    pipe = opened("labels")
    for flags, request in ((interval, fields), (interval + cache, fields | chosen | {"cache": "taylorseer"})):
        assert sample(handmade("labels"), "--labels", "1", "3", "--json", *flags) == 0
        run = pipe.run(Request([1, 3], **request))
        np.testing.assert_array_equal(np.load("x.npy"), run.result())
        assert json.loads(capsys.readouterr().out)["rows"] == run.rows
    plain = pipe.run(Request([1, 3], steps=9, output="latents"))
    assert not np.array_equal(plain.result(), np.load("x.npy")) and run.rows < 12 < plain.planned_rows == 18
    flags = ["--cache", "easycache", "--cache-threshold", "0.5", "--disable-cache-before-step", "2", "--steps", "9"]
    assert sample(handmade("labels"), "--labels", "1", "--json", *flags) == 0
    assert json.loads(capsys.readouterr().out)["rows"] < 18


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--condition", "captions=nowhere.npy"], "nowhere.npy"),
        (["--condition", "captions=condition.npz"], "condition.npz: not a .npy file of numbers"),
        (["--condition", "captions.npy"], "captions.npy: not a .npz file"),
        (["--condition", "broken.npz"], "broken.npz: not a .npz file of numbers"),
        (["--condition", "words.npz"], "words.npz: captions: not an array of numbers"),
        (["--condition", "captions=captions.npy", "mask"], "--condition 'mask'; expected NAME=FILE.npy"),
        (["--condition", "captions=captions.npy", "captions=captions.npy"], "each name once"),
        (["--condition", "=captions.npy", "a=b"], "expected NAME=FILE.npy"),
        (["--condition", "caption=captions.npy"], "unknown port 'caption' (did you mean \"captions\"?)"),
        (["--condition", "captions=captions.npy"], "guidance needs negative= with captions"),
        (
            ["--condition", "condition.npz", "--negative-condition", "mask=mask.npy"],
            "guidance needs negative= with captions",
        ),
        (["--labels", "1"], "this bundle takes captions, mask, and no labels"),
        ([], "condition lacks captions"),
    ],
    ids=str,
)
def test_refused_in_one_line(handmade, folder, capsys, options, words) -> None:
    assert sample(handmade("captioned"), *options) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (folder / "x.npy").exists()


def test_a_bundle_in_a_few_lines(handmade) -> None:
    lines = summary(handmade("wave"), manifest.read(handmade("wave"))).splitlines()
    assert "port       signal: state, float32, 6" in lines
    assert "port       words_mask: condition, float32, 3, marks the tokens of words" in lines
    (conditioner,) = [line for line in lines if line.startswith("conditioner")]
    assert "once a timestep and condition, reads moment, modulation, summary" in conditioner
    labels = summary(handmade("labels"), manifest.read(handmade("labels")))
    assert "5 classes with names" in labels and "0 to 5, guidance leads away from 5" in labels
    assert "batch      a sample may depend on the others of its batch" in lines
    invariant = replace(manifest.read(handmade("wave")), batch_invariant=True)
    assert "a sample does not depend on the others of its batch" in summary(handmade("wave"), invariant)
    assert "no guidance" in summary(handmade("free"), manifest.read(handmade("free")))


@pytest.mark.parametrize("kind", ["labels", "captioned", "wave", "video", "free"])
def test_every_kind_is_timed(handmade, capsys, kind) -> None:
    assert main(["bench", str(handmade(kind)), "--steps", "2", "--rounds", "1", "--batch", "2", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["timings"]]
    contract = manifest.read(handmade(kind))
    assert {f"{stage.name}, a row" for stage in contract.before_loop} <= {*names}
    assert ("denoiser, a guided step" in names) == contract.mixes_guidance
    assert ("decoder" in names) == (contract.end is not None)
    assert names[0].startswith("the first ") and names[0].removeprefix("the first ") in names  # of a warm pipeline
