"""Bundles of single sizes are joined: what both have stands once, and each draws what it drew alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from dit_export.bundle.sizes import join
from dit_export.cli import main
from dit_runtime import Pipeline, UsageError
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest

OPTIONS = {"labels": [1, 3], "steps": 3, "seed": 5}
SIZES = {"labels": "32", "wide": "32x64"}
Change = Callable[[Path], None]


def joined(handmade, tmp_path: Path, change: Change = lambda folder: None) -> tuple[Path, Manifest]:
    """Return the bundle of both sizes; `change` alters that of the second one before."""
    folders = [Path(shutil.copytree(handmade(kind), tmp_path / kind)) for kind in SIZES]
    change(folders[1])
    contracts = [
        replace(manifest.read(folder), size=size) for folder, size in zip(folders, SIZES.values(), strict=True)
    ]
    contract = join(folders[0], contracts[0], folders[1], contracts[1])
    manifest.write(folders[0], replace(contract, files=manifest.describe_files(folders[0])))
    return folders[0], manifest.read(folders[0])


def test_each_draws_what_it_drew_alone(handmade, tmp_path) -> None:
    folder, contract = joined(handmade, tmp_path)
    for kind, size in SIZES.items():
        with Pipeline.load(handmade(kind)) as alone, Pipeline.load(folder, size=size) as both:
            assert np.array_equal(both.sample(**OPTIONS), alone.sample(**OPTIONS))
    wide = contract.at("32x64")
    assert [stage.name for stage in wide.stages] == [
        "conditioner",
        "denoiser-32x64",
        "update-32x64",
        "decoder-32x64",
    ]
    assert wide.stages[0] == contract.stages[0]
    assert (folder / "reference-32x64.npz").read_bytes() == (handmade("wide") / "reference.npz").read_bytes()


def test_tensors_of_the_same_content_stand_once(handmade, tmp_path) -> None:
    """The second step stage gets the first one's weights, under another name and beside some of its own."""

    def change(folder: Path) -> None:
        source = onnx.load(handmade("labels") / "denoiser.onnx")
        model = onnx.load(folder / "denoiser.onnx")
        [weight] = [tensor for tensor in source.graph.initializer if tensor.name == "mixed"]
        weight.name = "unused"
        model.graph.initializer.append(weight)
        save(model, folder, "denoiser")

    folder, contract = joined(handmade, tmp_path, change)
    step = contract.at("32x64").step
    assert step.shared == ("denoiser.onnx.data",)
    first, own = (contract.files[f"{name}.onnx.data"].size for name in ("denoiser", step.name))
    assert own < 3 * first  # twice as wide, and not once more of the first's
    values = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(folder / step.onnx).graph.initializer
    }
    weight = onnx.load(folder / "denoiser.onnx").graph.initializer[0]
    assert np.array_equal(values["unused"], onnx.numpy_helper.to_array(weight))
    with Pipeline.load(handmade("wide")) as alone, Pipeline.load(folder, size="32x64") as both:
        assert np.array_equal(both.sample(**OPTIONS), alone.sample(**OPTIONS))


def test_a_stage_of_other_weights_is_another_stage(handmade, tmp_path) -> None:
    """A stage may read and give the same at both sizes, and its numbers not."""

    def change(folder: Path) -> None:
        model = onnx.load(folder / "conditioner.onnx")
        [table] = [tensor for tensor in model.graph.initializer if tensor.name == "table"]
        table.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(table), "table"))
        save(model, folder, "conditioner")
        changed.append(Path(shutil.copytree(folder, tmp_path / "alone")))

    changed: list[Path] = []
    folder, contract = joined(handmade, tmp_path, change)
    assert contract.at("32x64").stages[0].name == "conditioner-32x64"
    with Pipeline.load(changed[0]) as alone, Pipeline.load(folder, size="32x64") as both:
        assert np.array_equal(both.sample(**OPTIONS), alone.sample(**OPTIONS))
    with Pipeline.load(handmade("labels")) as alone, Pipeline.load(folder) as both:
        assert np.array_equal(both.sample(**OPTIONS), alone.sample(**OPTIONS))


def test_what_must_be_the_same(handmade, tmp_path) -> None:
    def change(folder: Path) -> None:
        table = json.loads((folder / manifest.NAME).read_text())
        table["guidance"]["channels"] = 1
        (folder / manifest.NAME).write_text(json.dumps(table))

    with pytest.raises(UsageError, match="size 32x64: guidance is"):
        joined(handmade, tmp_path, change)


def test_regress_checks_each_size(handmade, capsys) -> None:
    assert main(["regress", str(handmade("sizes"))]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("size ")] == [
        "size 32:",
        "size 32x64:",
    ]
    assert main(["regress", str(handmade("sizes")), "--size", "32x64", "--json"]) == 0
    names = [check["name"] for check in json.loads(capsys.readouterr().out)["checks"]]
    assert "denoiser-32x64: prediction, rel-L2" in names


def save(model: onnx.ModelProto, folder: Path, name: str) -> None:
    """Write a graph again, and name its files in the manifest."""
    for file in (f"{name}.onnx", f"{name}.onnx.data"):
        (folder / file).unlink()
    location = f"{name}.onnx.data"
    onnx.save(model, folder / f"{name}.onnx", save_as_external_data=True, location=location, size_threshold=128)
    table = json.loads((folder / manifest.NAME).read_text())
    table["files"] = {file: vars(own) for file, own in manifest.describe_files(folder).items()}
    (folder / manifest.NAME).write_text(json.dumps(table))
