"""Files that change after their sums were compared: an engine computes what was compared, or refuses."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from dit_runtime import BundleError, Pipeline
from dit_runtime.bundle import manifest
from tests.tamper import edit, weight

LABELS = [1, 3]
RUN = {"steps": 2, "guidance": 1, "output": "latents"}  # one row has a shape of its own without guidance
TICK = 0.02  # seconds, of the clock by which files are dated


@pytest.fixture
def openvino(bundle) -> Path:
    """The bundle on OpenVINO, which compiles a second shape at the first call of a single row."""
    edit(bundle, lambda table: [stage.update(backend="openvino") for stage in table["stages"]])
    return bundle


def another(folder: Path) -> Path:
    """Return a copy of the loop's weights that draw other pictures."""
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    values = weight(copy, "denoiser", name="mixed")
    values[:] = -values
    values.flush()
    return copy / "denoiser.onnx.data"


def test_a_file_in_anothers_place_changes_no_picture(openvino) -> None:
    with Pipeline.load(openvino, threads=2) as pipe:
        expected = {count: pipe.sample(LABELS[:count], **RUN) for count in (2, 1)}
    with Pipeline.load(openvino, threads=2) as pipe:
        another(openvino).replace(openvino / "denoiser.onnx.data")
        for count in (2, 1):
            assert np.array_equal(pipe.sample(LABELS[:count], **RUN), expected[count])


def test_a_file_that_is_written_is_refused_at_the_next_shape(openvino) -> None:
    with Pipeline.load(openvino, threads=2) as pipe:
        pipe.sample(LABELS, steps=2, guidance=1, output="latents")
        shutil.copyfile(another(openvino), openvino / "denoiser.onnx.data")
        with pytest.raises(BundleError, match=r"denoiser.onnx.data: was written while it was open"):
            pipe.engines.open(pipe.manifest.step)._fixed(((1, 1), (1, 1)), 1)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_in_low_memory_each_opening_compares(bundle, backend) -> None:
    edit(bundle, lambda table: [stage.update(backend=backend) for stage in table["stages"]])
    with Pipeline.load(bundle, threads=1, low_memory=True) as pipe:
        pipe.sample(LABELS, steps=2)
        another(bundle).replace(bundle / "denoiser.onnx.data")
        with pytest.raises(BundleError, match=r"denoiser.onnx.data does not have the sha256"):
            pipe.sample(LABELS, steps=2)


def test_a_file_that_changes_while_it_is_opened(bundle) -> None:
    """New content, another file in its place, or one that is put back: the numbers of a file tell."""
    contract, name = manifest.read(bundle), "denoiser.onnx.data"
    for change in (
        lambda path: path.write_bytes(path.read_bytes()),
        lambda path: Path(shutil.copy(path, path.with_suffix(".x"))).replace(path),
        lambda path: (path.rename(path.with_suffix(".x")), path.with_suffix(".x").rename(path)),
    ):
        with (
            pytest.raises(BundleError, match="was changed while it was opened"),
            manifest.checking(bundle, contract, [name]),
        ):
            time.sleep(TICK)
            change(bundle / name)
    with manifest.checking(bundle, contract, [name]):
        pass


def test_another_manifest_than_was_asked_for(bundle) -> None:
    """The sum is of the bytes that are parsed; any case of its digits will do."""
    sum256 = manifest.sha256(bundle / "manifest.json")
    Pipeline.load(bundle, threads=1, manifest_sha256=sum256.upper()).close()
    edit(bundle, lambda table: table["model"].update(name="another"))
    with pytest.raises(BundleError, match=f"expected {sum256}; this is another bundle"):
        Pipeline.load(bundle, threads=1, manifest_sha256=sum256)


def test_unchanged_files_are_summed_once(bundle, monkeypatch) -> None:
    contract, checked, summed = manifest.read(bundle), {}, []
    plain = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda path: summed.append(path.name) or plain(path))
    for _ in range(3):
        with manifest.checking(bundle, contract, ["denoiser.onnx.data"], checked):
            pass
    assert summed == ["denoiser.onnx.data"]
