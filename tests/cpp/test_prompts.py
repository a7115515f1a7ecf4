"""Prompts in C++ as token ids: Python's pictures of the words, on hand-made bundles, SD3 and FLUX.1."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dit_runtime import Pipeline
from dit_runtime.cli import main
from dit_runtime.conditions.condition import Condition
from tests import tamper
from tests.cpp.test_conditions import condition_flags
from tests.cpp.test_same_pictures import ENGINES, load, same_latents
from tests.handmade import module

STEPS = 3
PROMPTS, NEGATIVE = ["a RED cat", "blue dog", "cat"], "hat"


@pytest.fixture(scope="module")
def prompted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompted") / "bundle"
    module("make_bundle").make(folder, "prompted")
    return folder


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embedded") / "bundle"
    module("make_bundle").make(folder, "embedded")
    return folder


def ids(pipe: Pipeline, words: list[str], negative: bool = False) -> Condition:
    return pipe.engines.tokenizers(words, negative)


@pytest.mark.parametrize("engine", ENGINES)
def test_ids_draw_as_words(prompted, dit_generate, tmp_path, engine) -> None:
    rate = {"rate": np.array([0.5, 1, 2], np.float32)}
    options = {"steps": STEPS, "guidance": 3.0, "seed": 7, "output": "latents"}
    arguments = ["--steps", STEPS, "--guidance", 3, "--seed", 7, "--backend", engine, "-o", tmp_path / "x.npy"]
    with load(prompted, engine) as pipe:
        expected = pipe.sample(prompt=PROMPTS, negative_prompt=NEGATIVE, condition=rate, **options)
        for words in (PROMPTS, [*PROMPTS[:2], "dog"]):
            flags = condition_flags(tmp_path, ids(pipe, words) | rate, ids(pipe, [NEGATIVE], negative=True))
            done = dit_generate(prompted, *flags, *arguments)
            assert done.returncode == 0, done.stderr
            assert same_latents(np.load(tmp_path / "x.npy"), expected) == (words == PROMPTS)


def test_ids_as_text(prompted, dit_generate, tmp_path) -> None:
    """A row a line; what is no row of integers is one line."""
    own = {"ids": "2 4 6 0 0\n2 5 7 1 0\n", "ids_mask": "1 1 1 0 0\n\n1 1 1 1 0", "ids_2": "2 4 0 0\n3 1 4 0\n"}
    arrays = {name: np.array([line.split() for line in text.splitlines() if line], int) for name, text in own.items()}
    rate = {"rate": np.zeros(2, np.float32)}
    np.save(tmp_path / "rate.npy", rate["rate"])
    for name, text in own.items():
        (tmp_path / f"{name}.txt").write_text(text)
    files = [f"{name}={tmp_path / f'{name}.txt'}" for name in own]
    arguments = ["--steps", STEPS, "--guidance", 1, "-o", tmp_path / "x.npy"]
    command = [prompted, "--condition", *files, f"rate={tmp_path / 'rate.npy'}", *arguments]
    done = dit_generate(*command)
    assert done.returncode == 0, done.stderr
    with load(prompted, "onnxruntime") as pipe:
        expected = pipe.sample(condition=arrays | rate, steps=STEPS, guidance=1.0, output="latents")
    assert same_latents(np.load(tmp_path / "x.npy"), expected)
    for text, message in (
        ("2 4 6 0 0\n2 5 7 1\n", "ids.txt: line 2 has 4 integers"),
        ("2 4 6 0 cat\n", "ids.txt: line 1 has 4 integers; expected a row of them a line, all of one length"),
        ("2 4 6 0 0.5\n", "ids.txt: line 1 has 5 integers"),
        ("\n", "ids: not a condition: expected numbers in rows"),
        ("2 4 6 0\n2 5 7 1\n", "condition: ids has shape [2, 4]; expected [rows, 5]"),
        ("2 4 6 0 8\n2 5 7 1 0\n", "ids holds other values than the integers from 0 to 7"),
    ):
        (tmp_path / "ids.txt").write_text(text)
        done = dit_generate(*command)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    (tmp_path / "ids.txt").unlink()
    assert "ids.txt: cannot be read" in dit_generate(*command).stderr


def test_mistakes(prompted, dit_generate, tmp_path) -> None:
    own = {"ids": np.ones((1, 5), int), "ids_mask": np.ones((1, 5), int), "ids_2": np.ones((1, 4), int)}
    rate = {"rate": np.ones(1, np.float32)}
    captions = {"captions": np.ones((1, 5, 3), np.float32)}
    for condition, negative, message in (
        (rate, None, "no prompt; pass its token ids as ids, ids_mask, ids_2"),
        (own | rate, None, "guidance needs a negative with ids, ids_mask, ids_2, to lead away from"),
        (own, own, "condition lacks rate; expected an array for each of ids, ids_mask, ids_2, rate"),
        (own | rate | captions, own, "condition has the unknown port 'captions'; known: ids, ids_mask, ids_2, rate"),
        (captions | rate, own, "condition lacks pooled"),
    ):
        done = dit_generate(prompted, *condition_flags(tmp_path, condition, negative), "-o", tmp_path / "x.npy")
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_embedded_guidance(embedded, dit_generate, tmp_path, engine) -> None:
    """One group, with the weight as a condition; steps and weight are the bundle's where nobody names them."""
    with load(embedded, engine) as pipe:
        for named in ({}, {"guidance": 6.0}, {"guidance": 0.5, "steps": 5}):
            flags = [word for name, value in named.items() for word in (f"--{name}", value)]
            command = [embedded, "--labels", 0, 3, *flags, "--seed", 4, "--backend", engine, "-o", tmp_path / "x.npy"]
            done = dit_generate(*command)
            assert done.returncode == 0, done.stderr
            expected = pipe.sample([0, 3], seed=4, output="latents", **named)
            assert same_latents(np.load(tmp_path / "x.npy"), expected), named
            other = pipe.sample([0, 3], seed=4, output="latents", **named | {"guidance": 2.0})
            assert not same_latents(np.load(tmp_path / "x.npy"), other)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["prompted", "embedded"])
def test_verify(request, dit_generate, kind, engine) -> None:
    done = dit_generate(request.getfixturevalue(kind), "--verify", "--backend", engine)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "verified", done.stdout + done.stderr
    assert dit_generate(request.getfixturevalue(kind), "--verify", "--low-memory").returncode == 0


@pytest.mark.parametrize("program", ["dit-run", "dit-generate"])
def test_verify_runs_the_encoders(prompted, dit_generate, tmp_path, capsys, program) -> None:
    """Another weight of theirs fails by the name of its port; without the reference of prompts nothing is verified."""
    bundle = Path(shutil.copytree(prompted, tmp_path / "bundle"))

    def verified() -> tuple[int, str]:
        if program == "dit-generate":
            done = dit_generate(bundle, "--verify")
            return done.returncode, done.stdout + done.stderr
        code = main(["verify", str(bundle), "--threads", "1"])
        return code, "".join(capsys.readouterr())

    code, text = verified()
    rows = [line.split() for line in text.splitlines() if " of ids, fingerprint" in line]
    assert code == 0 and [row[1] for row in rows] == ["captions", "mask", "pooled"]
    table = tamper.weight(bundle, "text", name="table_2")
    table *= 2
    table.flush()
    tamper.seal(bundle)
    code, text = verified()
    failed = [line.split()[:2] for line in text.splitlines() if "FAILED" in line and "fingerprint" in line]
    assert code == 1 and failed == [["text:", "pooled"]]
    tamper.edit(bundle, lambda table: table["files"].pop("prompts.npz"))
    code, text = verified()
    assert code == 2 and "prompts.npz is not in the manifest, and nothing else checks the text stage" in text


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("ids", None, "ids"),
        ("ids", np.full((2, 5), 8), "ids holds other values than the integers from 0 to 7"),
        ("fingerprint.mask", None, "fingerprint.mask"),
        ("fingerprint.mask", np.ones((1, 4), np.float32), "fingerprint.mask"),
    ],
)
def test_a_reference_of_prompts_that_does_not_fit(prompted, dit_generate, tmp_path, capsys, name, values, words):
    bundle = Path(shutil.copytree(prompted, tmp_path / "bundle"))
    arrays = dict(np.load(bundle / "prompts.npz"))
    arrays |= {} if values is None else {name: values}
    np.savez(bundle / "prompts.npz", **{key: array for key, array in arrays.items() if key != name or array is values})
    tamper.seal(bundle)
    done = dit_generate(bundle, "--verify")
    assert main(["verify", str(bundle), "--threads", "1"]) == done.returncode == 2
    for line in (done.stderr.splitlines()[-1], capsys.readouterr().err.strip()):
        assert "prompts.npz" in line and words in line and line.endswith("rebuild the bundle"), line
