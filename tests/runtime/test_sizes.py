"""Bundles of several sizes, of hand-made graphs: views of a manifest, of a pipeline and of its engines."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest

from dit_runtime import BundleError, Pipeline, Request, UsageError, verify
from dit_runtime.bundle import manifest
from dit_runtime.bundle.parsing import parse
from dit_runtime.cli import main

OPTIONS = {"labels": [1, 3], "steps": 3, "seed": 5}


@pytest.fixture
def table(handmade) -> dict:
    return json.loads((handmade("sizes") / manifest.NAME).read_text())


def test_views_of_a_manifest(handmade) -> None:
    first = manifest.read(handmade("sizes"))
    wide = first.at("32x64")
    assert first.size_names == ("32", "32x64") and wide.size_names == ("32x64", "32")
    assert (first.state.shape, wide.state.shape) == ((2, 4, 4), (2, 4, 8))
    assert wide.at("32") == first and wide.at(None) is wide and first.at("32x32") is first
    assert (first.own("reference.npz"), wide.own("reference.npz")) == ("reference.npz", "reference-32x64.npz")
    assert [size.size for size in first.each_size] == ["32", "32x64"]
    assert wide.step.onnx_files == ("denoiser-32x64.onnx", "denoiser-32x64.onnx.data", "conditioner.onnx.data")
    with pytest.raises(UsageError, match="size 64 is not in this bundle; it has 32, 32x64"):
        first.at("64x64")
    with pytest.raises(UsageError, match="size 64 is not in this bundle; it has one size"):
        manifest.read(handmade("labels")).at(64)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("size", "32", "size '32' stands there 2 times, expected once"),
        ("size", "64x64", "size: got 64x64, expected the name of a size, such as 512 or 512x768"),
        ("size", 64, "size 1 (64): size: got 64, expected str"),
        ("suffix", "", "suffix '' stands there 2 times, expected once"),
        ("colour", "red", "size 1 (32x64) has the unknown key 'colour'"),
        ("ports", [], "state ports: got [], expected exactly one"),
    ],
)
def test_sizes_that_are_refused(table, key, value, words) -> None:
    table["sizes"][0][key] = value
    with pytest.raises((ValueError, BundleError), match=re.escape(words)):
        parse(table)


def test_stages_of_one_name_are_one_stage(table) -> None:
    other = copy.deepcopy(table)
    other["sizes"][0]["stages"][0]["max_batch"] += 1
    with pytest.raises(ValueError, match="stage conditioner: got another one in another size"):
        parse(other)
    del table["sizes"][0]["stages"]
    with pytest.raises(ValueError, match="stages"):
        parse(table)


def test_one_pipeline_draws_each_size(handmade) -> None:
    with Pipeline.load(handmade("sizes")) as pipe:
        first = pipe.sample(**OPTIONS)
        assert "denoiser-32x64" not in pipe.engines.opened
        wide = pipe.sample(size="32x64", **OPTIONS)
        assert (first.shape, wide.shape) == ((2, 32, 32, 3), (2, 32, 64, 3))
        assert np.array_equal(pipe.at("32x64").sample(**OPTIONS), wide)
        assert np.array_equal(pipe.sample(size=32, **OPTIONS), first)
        assert sorted(pipe.engines.opened) == [
            "conditioner",
            "decoder",
            "decoder-32x64",
            "denoiser",
            "denoiser-32x64",
        ]
    with Pipeline.load(handmade("sizes"), size="32x64", low_memory=True) as pipe:
        assert np.array_equal(pipe.sample(**OPTIONS), wide)
        assert np.array_equal(pipe.sample(size="32", **OPTIONS), first) and len(pipe.engines.opened) == 1


def test_latents_have_the_shape_of_the_size(handmade) -> None:
    contract = manifest.read(handmade("sizes"))
    latents = np.zeros((1, 2, 4, 8))
    assert Request([1], size="32x64", latents=latents).check(contract).latents is not None
    with pytest.raises(UsageError, match="latents have shape"):
        Request([1], latents=latents).check(contract)


def test_files_of_a_size_are_checked_when_it_opens(copied) -> None:
    bundle = copied("sizes")
    with (bundle / "denoiser-32x64.onnx.data").open("r+b") as file:
        file.write(b"spoiled")
    with Pipeline.load(bundle) as pipe:
        pipe.sample(**OPTIONS)
        with pytest.raises(BundleError, match=r"denoiser-32x64\.onnx\.data does not have the sha256"):
            pipe.sample(size="32x64", **OPTIONS)


def test_each_size_is_verified_and_compiled(copied, capsys) -> None:
    """An error of one size shows in its figures alone; `compile` keeps an outcome for each size."""
    bundle = copied("sizes")
    table = json.loads((bundle / manifest.NAME).read_text())
    for stage in (*table["stages"], *table["sizes"][0]["stages"]):
        stage["backend"] = "openvino"
    (bundle / manifest.NAME).write_text(json.dumps(table))
    assert main(["compile", str(bundle), "--backend", "onnxruntime"]) == 0
    assert "32x64: denoiser-32x64: prediction, rel-L2" in capsys.readouterr().out
    compiled = manifest.read(bundle)
    assert {stage.backend for size in compiled.each_size for stage in size.stages} == {"onnxruntime"}
    assert [size.parity["passed"] for size in compiled.each_size] == [True, True]
    assert [size.batch_invariant for size in compiled.each_size] == [True, True]
    worst = [size.parity["worst"] for size in compiled.each_size]
    assert "denoiser: prediction, rel-L2" in worst[0] and "denoiser-32x64: prediction, rel-L2" in worst[1]
    with np.load(bundle / "reference-32x64.npz") as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(bundle / "reference-32x64.npz", **arrays | {"prediction": 1.1 * arrays["prediction"]})
    files = compiled.files | {"reference-32x64.npz": manifest.describe(bundle / "reference-32x64.npz")}
    table = json.loads(compiled.to_json())
    table["files"] = {name: vars(file) for name, file in files.items()}
    (bundle / manifest.NAME).write_text(json.dumps(table))
    with Pipeline.load(bundle) as pipe:
        failed = {figure.name for figure in verify.verify(pipe) if not figure.passed}
    assert failed == {"32x64: denoiser-32x64: prediction, rel-L2"}
