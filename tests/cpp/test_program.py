"""dit-generate's mistakes, and what it draws and verifies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from dit_runtime import Pipeline, Request, backends, verify
from dit_runtime.bundle import manifest
from tests.handmade import module
from tests.tamper import leak


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["BUNDLE"], "no labels; pass at least one class name or number"),
        ([], "no bundle"),
        (["BUNDLE", "--labels"], "--labels needs a value"),
        (["BUNDLE", "--labels", "1", "--step", "3"], "unrecognized argument --step"),
        (["BUNDLE", "--labels", "1", "--steps", "x"], "--steps is 'x'; expected an integer"),
        (["BUNDLE", "--labels", "1", "--steps", "0"], "--steps is '0'"),
        (["BUNDLE", "--labels", "1", "--guidance", "nan"], "finite"),
        (["BUNDLE", "--labels", "1", "--guidance", "1", "2"], "guidance has 2 numbers"),
        (["BUNDLE", "--labels", "1", "--guidance-interval", "0.5"], "--guidance-interval needs a value"),
        (["BUNDLE", "--labels", "1", "--guidance-interval", "0.5", "0.2"], "guidance_interval is (0.5, 0.2)"),
        (["BUNDLE", "--labels", "1", "--guidance-policy", "apg", "x=1"], "guidance_policy apg has no 'x'"),
        (["BUNDLE", "--labels", "1", "--cache", "taylor"], 'did you mean "taylorseer"'),
        (["BUNDLE", "--labels", "1", "--cache-interval", "2"], "got cache_interval without a cache"),
        (["BUNDLE", "--labels", "1", "--seed", str(2**64)], "2**64 - 1"),
        (["BUNDLE", "--labels", "1", "--seed", "1", "2"], "2 seeds for 1 samples"),
        (["BUNDLE", "--labels", "anz"], 'did you mean "ant"?); the bundle has ant, bee, cat, …'),
        (["BUNDLE", "--labels", "5"], "label 5 is out of range; expected 0 to 4"),
        (["BUNDLE", "--labels", "-1"], "label -1 is out of range"),
        (["BUNDLE", "--labels", "1", "--preset", "quack"], 'did you mean "quick"'),
        (["BUNDLE", "--labels", "1", "--solver", "ddimm"], 'did you mean "ddim"'),
        (["BUNDLE", "--labels", "1", "--eta", "0.5", "--solver", "dpm++"], "only ddim takes it"),
        (["BUNDLE", "--labels", "1", "-o", "x.jpg"], ".png, .npz, .npy"),
        (["BUNDLE", "--labels", "1", "-o", "nowhere/x.png"], "does not exist"),
        (["BUNDLE", "--labels", "1", "--backend", "onyx"], "it has: onnxruntime"),
        (["BUNDLE", "--labels", "1", "--provider", "cuda"], "device 'cuda'"),
        (["BUNDLE", "--labels", "1", "--latents", "manifest.json"], "it is no .npy file"),
        (["BUNDLE", "--labels", "1", "--latents", "nowhere.npy"], "nowhere.npy"),
        (["BUNDLE", "--condition", "labels"], "labels: not a .npz file of numbers"),
        (["BUNDLE", "--condition", "labels=a.npy", "labels=b.npy"], "a.npy: not a .npy file of numbers"),
        (["BUNDLE", "--condition", "labels=", "x=y"], "--condition 'labels='; expected NAME=FILE.npy, each name once"),
        (["BUNDLE", "--labels", "1", "--negative-condition", "nowhere.npz"], "nowhere.npz: not a .npz file of numbers"),
        (["BUNDLE", "--labels", "1", "--condition", "reference.npz"], "not a condition"),
        (["BUNDLE", "BUNDLE", "--labels", "1"], "is too much"),
        (["BUNDLE", "--prompt", "a cat"], "--prompt: this program has no tokenizer; pass token ids with --condition"),
        (["BUNDLE", "--labels", "1", "--negative", "blurry"], "pass token ids with --negative-condition"),
        (["nowhere", "--labels", "1"], "no manifest.json"),
    ],
)
def test_a_mistake_is_one_line(tiny, dit_generate, monkeypatch, listing, arguments, said):
    monkeypatch.chdir(tiny)
    before = listing(tiny)
    done = dit_generate(*[tiny if word == "BUNDLE" else word for word in arguments])
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("dit-generate: error: ")
    assert said in done.stderr
    assert listing(tiny) == before


def test_a_mistake_for_machines(dit_generate):
    done = dit_generate("nowhere", "--labels", "1", "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["kind"], error["exit_code"]) == (2, "refused", 2)
    assert done.stderr == f"dit-generate: error: {error['message']}\n" and "no manifest.json" in error["message"]


def test_quiet(tiny, dit_generate):
    assert dit_generate(tiny, "--verify", "--quiet").stdout == ""


def test_a_bundle_without_a_decoder(meta, dit_generate, tmp_path):
    done = dit_generate(meta.bundle, "--labels", "ant", "-o", tmp_path / "x.png")
    assert done.returncode == 2 and "no decoder" in done.stderr


CACHE = {"cache_interval": 3, "max_order": 2, "disable_cache_before_step": 1, "disable_cache_after_step": -2}


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_interval": [0.2, 0.7]},
        {"guidance_policy": "rescale guidance_rescale=0.4"},
        {"guidance_policy": "zero_star", "guidance_interval": [0.3, 1]},
        {"guidance_policy": "apg eta=0.5 norm_threshold=3"},
        {"cache": "taylorseer"},
        {"cache": "taylorseer", **CACHE, "guidance_interval": [0.1, 0.6], "guidance_policy": "apg"},
        {"cache": "easycache", "cache_threshold": 0.3, "disable_cache_before_step": 2},
    ],
    ids=str,
)
def test_policies_and_caches_are_pythons(tiny, dit_generate, tmp_path, fields):
    """Two samples with a weight each, of which 1 is none; the same rows are counted."""
    file, flags = tmp_path / "x.npy", []
    for name, value in fields.items():
        words = value if isinstance(value, list) else str(value).split()
        flags += [f"--{name.replace('_', '-')}", *words]
    options = ["--labels", 1, 3, "--guidance", 3, 1, "--steps", 12, "--seed", 4, 5, "-o", file, "--json"]
    done = dit_generate(tiny, *options, *flags)
    assert done.returncode == 0, done.stderr
    with Pipeline.load(tiny, threads=1) as pipe:
        options = {"guidance": [3.0, 1.0], "steps": 12, "seed": [4, 5], "output": "latents"}
        run, plain = pipe.run(Request([1, 3], **options, **fields)), pipe.sample([1, 3], **options)
        expected = run.result()
    assert json.loads(done.stdout)["rows"] == run.rows < 24 + ("guidance_policy" in fields)
    assert np.linalg.norm(np.load(file) - expected) <= 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(plain - expected) > 1e-3 * np.linalg.norm(expected)


def test_json_and_words(tiny, dit_generate, tmp_path):
    done = dit_generate(tiny, "--labels", "honey bee", "elk", "--steps", 2, "-o", tmp_path / "x.npy", "--json")
    assert json.loads(done.stdout) == {"output": str(tmp_path / "x.npy"), "shape": [2, 2, 4, 4], "rows": 4}
    assert done.stderr == ""
    assert np.load(tmp_path / "x.npy").dtype == np.float32
    assert "onnxruntime" in dit_generate("--version").stdout
    assert "--labels" in dit_generate("--help").stdout


def test_a_preset(tiny, dit_generate, tmp_path):
    for name, fields in (("quick", module("make_bundle").PRESET), ("lean", module("make_bundle").LEAN)):
        arguments = [tiny, "--labels", "ant", "elk", "--preset", name, "-o", tmp_path / "x.npy"]
        assert dit_generate(*arguments).returncode == 0
        with Pipeline.load(tiny, threads=1) as pipe:
            expected = pipe.sample(["ant", "elk"], **fields, output="latents")
        assert np.allclose(np.load(tmp_path / "x.npy"), expected, atol=1e-6)  # sums in another order


def changed(bundle: Path, folder: Path, change: Callable[[Path], None], max_batch: int) -> Path:
    """A copy whose files are other ones, and its manifest right."""
    shutil.copytree(bundle, folder)
    change(folder)
    contract = manifest.read(bundle)
    stages = tuple(replace(s, max_batch=max_batch) if s.runs == "step" else s for s in contract.stages)
    manifest.write(folder, replace(contract, stages=stages, files=manifest.describe_files(folder)))
    return folder


def test_verify_says_what_python_says(tiny, dit_generate, tmp_path):
    """The same gates in the same JSON, for an engine that gives NaN for one label."""

    def spoil(folder: Path) -> None:
        weights = np.fromfile(folder / "conditioner.onnx.data", np.float32)
        weights[2 * 16] = np.nan
        weights.tofile(folder / "conditioner.onnx.data")

    bundle = changed(tiny, tmp_path / "bundle", spoil, max_batch=3)
    with Pipeline.load(bundle, threads=1) as pipe:
        expected = [check.to_dict() for check in verify.verify(pipe)]
    done = dit_generate(bundle, "--verify", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 1 and said["passed"] is False
    assert said["next"] == [f"dit-export regress {bundle} --report report.html"]
    for figure, check in zip(said["checks"], expected, strict=True):
        assert figure.keys() <= check.keys()
        value, wanted = figure.pop("value"), check.pop("value")
        assert figure.items() <= check.items()
        # Sums in another order: errors are some 1e-7.
        assert value == wanted if isinstance(wanted, str) else value == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert [check["metric"] for check in said["checks"]].count(verify.INVARIANCE) == 2
    assert {str(check["name"]) for check in said["checks"] if not check["passed"]} == {
        "conditioner: fingerprint, rel-L2"
    }


def test_a_nan_without_a_limit_has_failed(tiny, dit_generate, tmp_path):
    """On a device other than the CPU, a row that differs in a batch is only reported; NaN is no difference."""

    def spoil(folder: Path) -> None:
        weights = np.fromfile(folder / "conditioner.onnx.data", np.float32)
        weights[3 * 16] = np.nan  # label 3 is in the reference
        weights.tofile(folder / "conditioner.onnx.data")

    bundle = changed(tiny, tmp_path / "bundle", spoil, max_batch=3)
    done = dit_generate(bundle, "--verify", "--backend", "openvino", "--device", "AUTO")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"denoiser: {verify.INVARIANCE}")]
    assert done.returncode == 1 and re.search(r" nan +FAILED ", line), line


def test_a_note_where_the_cpu_has_no_bf16(tiny, dit_generate, tmp_path):
    """The program's note is the one of Python on the same machine."""
    contract = manifest.read(tiny)
    stages = [replace(s, precision="bf16" if s.runs == "step" else "fp32", backend="openvino") for s in contract.stages]
    shutil.copytree(tiny, tmp_path / "bundle")
    manifest.write(tmp_path / "bundle", replace(contract, stages=tuple(stages)))
    done = dit_generate(tmp_path / "bundle", "--labels", 1, "--steps", 2, "-o", tmp_path / "x.npy")
    line = backends.note("openvino", "bf16")
    assert done.returncode == 0 and done.stderr == (f"note: {line}\n" if line else "")


@pytest.mark.parametrize(("graph", "output"), [("denoiser", "prediction"), ("decoder", "images")])
def test_verify_sees_a_row_that_depends_on_its_batch(tiny, dit_generate, tmp_path, graph, output):
    bundle = changed(tiny, tmp_path / "bundle", lambda folder: leak(folder, graph, output), max_batch=3)
    done = dit_generate(bundle, "--verify", "--json")
    failed = [check["name"] for check in json.loads(done.stdout)["checks"] if not check["passed"]]
    assert done.returncode == 1 and failed == [f"{graph}: {verify.INVARIANCE}"]


@pytest.mark.parametrize("kind", ["tiny", "captioned"])
def test_verify_asks_no_more_than_a_batch(request, dit_generate, tmp_path, kind):
    """A denoiser of one sample at a time; the reference has two."""

    def fix(folder: Path) -> None:
        network = onnx.load(folder / "denoiser.onnx", load_external_data=False)
        for value in network.graph.input:
            if value.name in ("latents", "guidance"):
                value.type.tensor_type.shape.dim[0].dim_value = 1
        onnx.save(network, folder / "denoiser.onnx")

    bundle = changed(request.getfixturevalue(kind), tmp_path / "right", fix, max_batch=1)
    assert dit_generate(bundle, "--verify").returncode == 0
    bundle = changed(request.getfixturevalue(kind), tmp_path / "wrong", fix, max_batch=2)
    assert "the denoiser failed" in dit_generate(bundle, "--verify").stderr  # it is asked for what the manifest says


@pytest.mark.parametrize("options", [["--help"], ["BUNDLE", "--verify"]])
def test_nobody_reads_the_output(tiny, build, options):
    """Quiet: a closed pipe ends the program, as it ends others."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [build / "programs/dit-generate", *(tiny if option == "BUNDLE" else option for option in options)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")
