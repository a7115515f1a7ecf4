"""`dit-export demo …` as a user runs it, on a model that has hardly been trained: the ways through, not the quality."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from dit_export.cli import main
from dit_export.demo import data, run, store, train
from dit_runtime.bundle import manifest
from tests.demo.test_demo import TINY


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    train.train(folder / "model", plan=TINY, checkpoints=folder / "checkpoints")
    return folder / "model"


PRESETS = {"fast": {"steps": 9, "solver": "dpm++", "measured": {"rows": 18}}}


def test_show_then_score(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (weights / run.PRESETS).write_text(json.dumps(PRESETS))
    assert main(["demo", "show", "--weights", str(weights), "-o", str(tmp_path), "--count", "100"]) == 0
    printed = capsys.readouterr().out
    for precision in ("fp32", "int8"):
        folder, grid = tmp_path / f"demo-{precision}", tmp_path / f"demo-{precision}-grid.png"
        assert f"demo-{precision}: grid {grid}, report {folder}/report.html\n" in printed
        assert grid.read_bytes().startswith(b"\x89PNG")
        contract = manifest.read(folder)
        assert contract.labels == data.CLASSES and contract.step.precision == precision
        assert contract.presets == PRESETS
        manifest.check_files(folder, contract, ["report.html"])
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert page.count("<figcaption>demo-") == 2 and "demo-int8: the judge agrees with" in page
    bundle = tmp_path / "demo-fp32"

    assert main(["demo", "score", str(bundle), "--weights", str(weights), "--count", "100", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    # The same seed draws the same pictures, so the judge sees the same but for single grey levels.
    assert scores["bundle"]["accuracy"] == scores["PyTorch"]["accuracy"]
    assert scores["bundle"]["frechet"][0] == pytest.approx(scores["PyTorch"]["frechet"][0], rel=1e-2)

    # The gate takes the bundle's own judge, and what it says of real pictures.
    for name in ("judge.onnx", "judge.npz"):
        assert (bundle / name).read_bytes() == (tmp_path / f"demo-{name}").read_bytes()
    assert contract.built_with["judge"] == {"features": "judge.onnx", "real": "judge.npz"}
    assert main(["regress", str(bundle), "--count", "100", "--json"]) == 0
    rows = {row["metric"]: row["value"] for row in json.loads(capsys.readouterr().out)["checks"]}
    assert 0 <= rows["judge's agreement, share"] <= 1 and rows["to real pictures, Fréchet distance"] > 0


def test_the_judge_runs_without_pytorch(weights: Path, tmp_path: Path) -> None:
    assert main(["demo", "judge", "--weights", str(weights), str(tmp_path / "judge.onnx")]) == 0
    pictures = data.pool(data.HELD_OUT, 20).images
    inputs = pictures.transpose(0, 3, 1, 2).astype(np.float32) / 255
    outputs = onnxruntime.InferenceSession(tmp_path / "judge.onnx").run(None, {"images": inputs})
    with torch.no_grad():
        expected = store.load_judge(weights)(torch.from_numpy(inputs))
    for got, want in zip(outputs, expected, strict=True):  # fp32 sums in another order; of the largest value
        assert np.abs(got - want.numpy()).max() <= 1e-4 * np.abs(got).max()


@pytest.mark.parametrize("arguments", [["show"], ["show-sr"], ["score", "x"], ["judge", "x.onnx"]])
def test_without_weights_it_says_how_to_make_them(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments, "--weights", "nowhere"]) == 2
    assert "dit-export demo train" in capsys.readouterr().err
