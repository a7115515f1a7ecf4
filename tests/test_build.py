"""Tests of what a build leaves behind: a whole bundle or none. A failing gate leaves the old bundle untouched."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import dit_export.bundle.build
import dit_runtime.verify
from dit_export.cli import main
from dit_export.cli.recipe import add_recipe, read_recipe
from dit_export.recipe import Recipe
from dit_export.verify.check import Built
from dit_runtime import UsageError
from dit_runtime.backends import Tuning
from dit_runtime.bundle import manifest
from dit_runtime.options import Parser
from dit_runtime.verify import Figure
from tests import conftest
from tests.conftest import HEADS, meta_state


@pytest.fixture
def checkpoint(meta: conftest.Built, tmp_path: Path) -> list[str]:
    """The arguments that build the small checkpoint, whose session's bundle must not be touched."""
    return ["build", "--checkpoint", str(meta.checkpoint), "--heads", str(HEADS), "--latents-only"]


def test_a_failed_gate_replaces_nothing(
    meta_copy: Path, checkpoint: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (meta_copy / "manifest.json").read_bytes()
    strict = replace(dit_runtime.verify.TOLERANCES["fp32"], latents=0.0)
    monkeypatch.setitem(dit_runtime.verify.TOLERANCES, "fp32", strict)
    assert main([*checkpoint, "-o", str(meta_copy)]) == 1

    assert (meta_copy / "manifest.json").read_bytes() == before
    failed = meta_copy.with_name(meta_copy.name + ".failed")
    said = capsys.readouterr().out
    assert f"the bundle that failed: {failed}\nits report: {failed}/report.html\n" in said
    assert "next:" not in said  # no precision is wider than fp32
    parity = json.loads((failed / "parity.json").read_text())
    assert {check["name"] for check in parity["checks"] if not check["passed"]} == {"run: latents, rel-L2"}
    assert not manifest.read(failed).parity["passed"]
    assert sorted(path.name for path in meta_copy.parent.iterdir()) == [meta_copy.name, failed.name]


def test_a_failed_build_keeps_the_good_calibration(
    meta_copy: Path, checkpoint: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = meta_copy.with_name(f"{meta_copy.name}.calibration.npz")
    good.write_bytes(b"good")
    strict = replace(dit_runtime.verify.TOLERANCES["int8"], latents=0.0)
    monkeypatch.setitem(dit_runtime.verify.TOLERANCES, "int8", strict)
    assert main([*checkpoint, "--precision", "int8", "--backend", "onnxruntime", "-o", str(meta_copy)]) == 1
    assert good.read_bytes() == b"good"
    assert meta_copy.with_name(f"{meta_copy.name}.failed.calibration.npz").is_file()


def test_a_build_that_breaks_off_leaves_nothing(
    meta_copy: Path, checkpoint: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (meta_copy / "manifest.json").read_bytes()
    meta_copy.with_name(f".{meta_copy.name}.partial-0a").mkdir()  # of a build that was killed
    monkeypatch.setattr(dit_export.bundle.build, "make_reference", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*checkpoint, "-o", str(meta_copy)]) == 130
    assert (meta_copy / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in meta_copy.parent.iterdir()) == [meta_copy.name]


def test_weights_that_hear_nothing_are_reported(
    tmp_path: Path, checkpoint: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    state = meta_state()
    for name in state:  # adaLN-Zero as it is initialised: no block does anything, the prediction is zero
        if "adaLN" in name or "final_layer.linear" in name or name.endswith(".bias"):
            state[name] = torch.zeros_like(state[name])
    torch.save(state, tmp_path / "deaf.pt")
    checkpoint[2] = str(tmp_path / "deaf.pt")
    assert main([*checkpoint, "-o", str(tmp_path / "bundle")]) == 0
    warning = capsys.readouterr().err
    assert "these weights hardly react" in warning and "another condition, rel-L2: 0, expected 0.001" in warning
    assert manifest.read(tmp_path / "bundle").parity["proof"] == "insensitive"
    parity = json.loads((tmp_path / "bundle" / "parity.json").read_text())
    assert [figure["passed"] for figure in parity["proof_figures"]] == [False] * 3
    assert all(check["passed"] and "proof" not in check["name"] for check in parity["checks"])


def test_the_summary_hides_no_nan() -> None:
    values = [("a", 0.1), ("a", math.nan), ("b", 0.1), ("b", 0.2)]
    checks = [Figure("run", metric, value, 1) for metric, value in values]
    worst = dit_export.bundle.build.summary(Built(Path(), [], checks, None, None))["worst"]
    assert worst == {"run: a": "nan", "run: b": 0.2}


def test_recipe_file_and_flags_give_the_same_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'model = "S/8"\nresolution = 512\nlatents-only = true\nmax-batch = 2\nsynthetic = 7\n'
        'compute-capability = ["8.6", "8.9"]\npool-limit = ["workspace:4G"]\nrefittable = true\n'
    )
    flags = ["S/8", "--resolution", "512", "--latents-only", "--max-batch", "2", "--synthetic", "7"]
    flags += ["--compute-capability", "8.6", "8.9", "--pool-limit", "workspace:4G", "--refittable"]
    parser = Parser()
    add_recipe(parser)
    tuning = Tuning(compute_capability=("8.6", "8.9"), pool_limit=("workspace:4G",), refittable=True)
    expected = Recipe(model="S/8", resolution=512, latents_only=True, max_batch=2, synthetic=7, **vars(tuning))
    assert expected.tuning == tuning
    assert Recipe.from_toml(recipe) == expected
    assert read_recipe(parser.parse_args(flags)) == expected
    assert read_recipe(parser.parse_args([str(recipe), "--max-batch", "3"])) == replace(expected, max_batch=3)
    recipe.write_text(expected.to_toml())
    assert Recipe.from_toml(recipe) == expected == Recipe(**json.loads(json.dumps(asdict(expected))))
    assert "timing" not in expected.to_toml()  # what is as by default is not said
    recipe.write_text("compute-capability = 8.9\n")
    with pytest.raises(UsageError, match=r"compute-capability is 8\.9, expected list"):
        Recipe.from_toml(recipe)


@pytest.mark.parametrize("path", sorted(Path("engines").glob("*.toml")), ids=lambda path: path.name)
def test_committed_recipes_are_readable(path: Path) -> None:
    assert Recipe.from_toml(path).model


def test_two_builds_are_alike(meta: conftest.Built, checkpoint: list[str], tmp_path: Path) -> None:
    options = ["--labels", str(meta.checkpoint.with_name("labels.txt")), "--max-batch", "4"]
    assert main([*checkpoint, *options, "-o", str(tmp_path / "again")]) == 0
    first, again = manifest.read(meta.bundle), manifest.read(tmp_path / "again")
    for name in ("conditioner.onnx", "conditioner.onnx.data", "denoiser.onnx", "denoiser.onnx.data"):
        assert first.files[name] == again.files[name], name
    shutil.rmtree(tmp_path / "again")
