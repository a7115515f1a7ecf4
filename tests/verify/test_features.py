"""Any ONNX network as the judge of many pictures, and .npz files of pictures, features and statistics."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dit_export.cli import main
from dit_export.networks import fixtures
from dit_export.verify import distribution, features
from dit_export.verify.distribution import balanced_labels
from dit_export.verify.features import OnnxJudge
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Guidance, Manifest
from dit_runtime.errors import UsageError
from dit_runtime.sampling.process import Process
from tests.tamper import seal, swap_vectors
from tests.verify import tiny

COUNT, CLASSES = 100, 1000


def network(path: Path, outputs: tuple[str, ...] = ("features", "logits"), shape: tuple = ("n", 3, "h", "w")) -> Path:
    """Features: each channel's mean in 4 x 4 places; logits: a linear of them."""
    kind = TensorProto.FLOAT
    weight = np.random.default_rng(0).standard_normal((48, CLASSES)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["pictures"], ["places"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Reshape", ["places", "flat"], [outputs[0]]),
    ]
    if len(outputs) > 1:
        nodes.append(helper.make_node("MatMul", [outputs[0], "weight"], [outputs[1]]))
    constants = {"flat": np.array([0, -1]), "weight": weight}
    graph = helper.make_graph(
        nodes,
        "judge",
        [helper.make_tensor_value_info("pictures", kind, shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def pictures(seed: int, count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), np.uint8)


def by_hand(batch: np.ndarray) -> np.ndarray:
    means = batch.reshape(len(batch), 4, 16, 4, 16, 3).mean((2, 4)) / 255  # (N, 4, 4, 3)
    return means.transpose(0, 3, 1, 2).reshape(len(batch), -1)


@pytest.mark.parametrize("rows", ["n", 8], ids=["free batch", "batch of 8"])
def test_a_network_sees_pictures(tmp_path, rows):
    judged = OnnxJudge(network(tmp_path / "judge.onnx", shape=(rows, 3, "h", "w")), 1)(pictures(0, 20))
    np.testing.assert_allclose(judged.features, by_hand(pictures(0, 20)), atol=1e-6)  # float32 means
    assert judged.logits is not None and judged.logits.shape == (20, CLASSES)
    judged = OnnxJudge(network(tmp_path / "plain.onnx", ("pooled",), (rows, 3, "h", "w")), 1)(pictures(0, 20))
    np.testing.assert_allclose(judged.features, by_hand(pictures(0, 20)), atol=1e-6)
    assert judged.logits is None


@pytest.mark.parametrize(
    ("outputs", "shape", "message"),
    [
        (("a", "b"), ("n", 3, "h", "w"), "name the output to compare 'features'"),
        (("features",), ("n", 3, 299, 299), "takes pictures of 299 × 299, got 64 × 64"),
        (("features",), ("n", "c", "h", "w"), "expected one input, tensor\\(float\\)"),
    ],
)
def test_a_network_that_does_not_fit(tmp_path, outputs, shape, message):
    with pytest.raises(UsageError, match=message):
        OnnxJudge(network(tmp_path / "judge.onnx", outputs, shape), 1)(pictures(0, 2))


@pytest.mark.parametrize(
    ("pooled", "side", "message"),
    [
        ("features", 64, "features have shape \\[4\\]; expected \\[N, D\\]"),
        ("logits", 64, "logits are float32 \\[4\\]; expected \\[N, D\\]"),
        (None, 40, "judge.onnx: fails on pictures of 40 × 40: "),
    ],
)
def test_a_network_whose_answer_does_not_fit(tmp_path, pooled, side, message):
    model = onnx.load(network(tmp_path / "judge.onnx"))
    for node in [*model.graph.node]:
        if pooled in node.output:
            node.output[0] = "unpooled"
            mean = helper.make_node("ReduceMean", ["unpooled", "axis"], [pooled], keepdims=0)
            model.graph.node.append(mean)
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axis"))
    if pooled == "features":
        del model.graph.output[1], model.graph.node[2]
    onnx.save(model, tmp_path / "judge.onnx")
    with pytest.raises(UsageError, match=message):
        OnnxJudge(tmp_path / "judge.onnx", 1)(pictures(0, 4)[:, :side, :side])


def test_what_is_no_network(tmp_path):
    (tmp_path / "x.onnx").write_text("no")
    for path in (tmp_path / "x.onnx", tmp_path / "nothing.onnx"):
        with pytest.raises(UsageError, match=path.name):
            OnnxJudge(path)


def test_labels_are_balanced():
    assert np.bincount(balanced_labels(60, 20)).tolist() == [3] * 20
    spread = balanced_labels(100, 1000)
    assert len(set(spread)) == 100 and spread.max() > 980


def test_the_gate_judges_a_bundle(shared_embedders, tmp_path, capsys):
    """Figures of drawn pictures, a baseline of them that asks for as many again, and a bundle that is worse."""
    judge, baseline = network(tmp_path / "judge.onnx"), tmp_path / "baseline.json"
    np.savez(tmp_path / "real.npz", arr_0=pictures(1, 300))
    options = ["--features", str(judge), "--real", str(tmp_path / "real.npz"), "--threads", "1", "--json"]
    options += ["--baseline", str(baseline)]

    def regress(bundle: Path, *more: str) -> tuple[int, dict[str, dict]]:
        capsys.readouterr()
        code = main(["regress", str(bundle), *options, *more])
        return code, {row["metric"]: row for row in json.loads(capsys.readouterr().out)["checks"]}

    code, rows = regress(shared_embedders.bundle, "--count", str(COUNT), "--update-baseline")
    assert code == 0
    assert rows["judge's agreement, share"]["value"] <= 0.1  # made-up logits
    assert rows["to real pictures, Fréchet distance"]["value"] > 0.1 and rows["Inception, score"]["value"] > 1
    code, again = regress(shared_embedders.bundle)
    assert code == 0 and again["to real pictures, Fréchet distance"]["where"] == f"{COUNT} pictures"
    assert again["to real pictures, Fréchet distance"]["limit"] == pytest.approx(
        1.03 * rows["to real pictures, Fréchet distance"]["value"], rel=1e-3
    )

    other = network(tmp_path / "other.onnx", ("features",))
    command = ["regress", str(shared_embedders.bundle), "--baseline", str(baseline), "--features", str(other)]
    assert main([*command, "--threads", "1"]) == 2 and "the baseline's judge is" in capsys.readouterr().err

    broken = Path(shutil.copytree(shared_embedders.bundle, tmp_path / "broken"))
    swap_vectors(broken, 2)
    seal(broken)
    code, rows = regress(broken, "--against", str(shared_embedders.bundle))
    assert code == 1 and rows["same seed, mean, PSNR in dB"]["value"] < 30
    assert rows["same seed, mean, SSIM"]["value"] < 0.95


def test_the_same_bundle_against_itself(shared_embedders, tmp_path, capsys):
    judge = network(tmp_path / "judge.onnx")
    command = ["regress", str(shared_embedders.bundle), "--against", str(shared_embedders.bundle), "--threads", "1"]
    assert main([*command, "--features", str(judge), "--count", str(COUNT), "--json"]) == 0
    rows = {row["metric"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
    assert rows["same seed, mean, PSNR in dB"]["value"] == 100 and rows["same seed, mean, SSIM"]["value"] == 1
    assert rows["judge's agreement, share"]["limit"] == rows["judge's agreement, share"]["value"] - 0.005


def name_judge(bundle: Path, **names: str) -> None:
    contract = manifest.read(bundle)
    files = {**contract.files, **{name: manifest.describe(bundle / name) for name in names.values()}}
    manifest.write(bundle, replace(contract, files=files, built_with={**contract.built_with, "judge": names}))


def test_a_bundle_brings_its_judge(shared_embedders, tmp_path, capsys):
    """The judge comes with or without real pictures' statistics. Its files are checked like all others."""
    bundle = Path(shutil.copytree(shared_embedders.bundle, tmp_path / "bundle"))
    command = ["regress", str(bundle), "--threads", "1", "--json", "--count", str(COUNT)]
    assert main(command) == 2 and "pass --features FILE.onnx" in capsys.readouterr().err
    network(bundle / "judge.onnx")
    name_judge(bundle, features="judge.onnx")
    assert main(command) == 0
    metrics = {row["metric"] for row in json.loads(capsys.readouterr().out)["checks"]}
    assert {"judge's agreement, share", "Inception, score"} <= metrics
    assert "to real pictures, Fréchet distance" not in metrics

    mean, covariance = distribution.fit(by_hand(pictures(1, 300)))
    np.savez(bundle / "judge.npz", mu=mean, sigma=covariance)
    name_judge(bundle, features="judge.onnx", real="judge.npz")
    assert main(command) == 0
    metrics = {row["metric"] for row in json.loads(capsys.readouterr().out)["checks"]}
    assert "to real pictures, Fréchet distance" in metrics
    with (bundle / "judge.npz").open("r+b") as file:
        file.seek(100)
        file.write(b"damaged")
    assert main(command) == 2 and "judge.npz does not have the sha256" in capsys.readouterr().err


def test_conditions_of_a_draw():
    """Classes as often, other ports by turns of the reference's rows, a negative where there is no constant."""
    for kind in ("labels", "both", "prompt"):
        net = tiny.network(kind)
        guidance = Guidance(tiny.CHANNELS)
        contract = Manifest(net.model, net.ports, net.null, (), guidance, Process(), ())
        rows, null = fixtures.conditions(net, 2), fixtures.null(net)
        reference = SimpleNamespace(condition=rows, negative=null)
        draw = features.plan_draw(contract, reference, 21)
        assert (draw.negative is None) == (kind == "labels")
        if draw.labels is None:
            assert kind == "prompt"
        else:
            assert np.bincount(draw.condition["labels"]).tolist() == [3] * tiny.CLASSES
        if kind != "labels":
            assert np.array_equal(draw.condition["prompt"][20], rows["prompt"][0]) and len(draw.condition["mask"]) == 21


def test_samples_from_files(meta, tmp_path, capsys):
    """ADM's way: an .npz of samples and one of real pictures, or their features, or the real ones' mu and sigma."""
    ours, real = pictures(2), np.clip(pictures(3, 150) // 2 + 90, 0, 255).astype(np.uint8)
    expected = distribution.gaussian_distance(*(distribution.fit(by_hand(each)) for each in (ours, real)))
    mean, covariance = distribution.fit(by_hand(real))
    np.savez(tmp_path / "ours.npz", arr_0=ours, arr_1=np.arange(COUNT) % 12)
    np.savez(tmp_path / "real.npz", arr_0=real)
    np.savez(tmp_path / "ours-features.npz", features=by_hand(ours), logits=np.eye(12)[np.arange(COUNT) % 12] * 50)
    np.savez(tmp_path / "real-features.npz", features=by_hand(real))
    np.savez(tmp_path / "statistics.npz", mu=mean, sigma=covariance, arr_0=np.zeros(3))
    judge = ["--features", str(network(tmp_path / "judge.onnx"))]

    def regress(samples: str, reference: str, *options: str) -> dict[str, dict]:
        capsys.readouterr()
        files = ["--samples", str(tmp_path / samples), "--real", str(tmp_path / reference)]
        assert main(["regress", str(meta.bundle), "--threads", "1", "--json", *files, *options]) == 0
        return {row["metric"]: row for row in json.loads(capsys.readouterr().out)["checks"]}

    for samples, reference, options in (
        ("ours.npz", "real.npz", judge),
        ("ours-features.npz", "statistics.npz", []),
        ("ours-features.npz", "real-features.npz", []),
        ("ours.npz", "statistics.npz", judge),
    ):
        rows = regress(samples, reference, *options)
        assert rows["to real pictures, Fréchet distance"]["value"] == pytest.approx(expected, rel=1e-3)  # float32
    assert regress("ours-features.npz", "statistics.npz")["Inception, score"]["value"] == pytest.approx(12, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "100"], "pass --features FILE.onnx"),
        (["--real", "other-width.npz"], "2000 pictures need a network .* pass --features FILE.onnx"),
        (["--features", "judge.onnx", "--count", "0"], "at least 100"),
        (["--features", "judge.onnx", "--real", "other-width.npz"], "this bundle has no decoder"),
        (["--samples", "narrow.npz", "--real", "other-width.npz"], "7 features a picture in --real, 5 in what"),
        (["--samples", "narrow.npz", "--real", "no-square.npz"], "mu is \\[7\\] and sigma \\[7\\]"),
        (["--samples", "pictures.npz"], "pass --features FILE.onnx"),
        (["--samples", "nothing.npz"], "no such file"),
        (["--samples", "text.npz"], "not an .npz"),
        (["--samples", "other.npz"], "holds other; expected features"),
        (["--samples", "array.npy"], "array.npy: one array without a name; expected an .npz of features or pictures"),
        (["--features", "judge.onnx", "--count", "50"], "at least 100"),
        (["--features", "judge.onnx", "--samples", "floats.npz"], "expected uint8"),
        (["--samples", "flat.npz"], "expected \\[N, D\\]"),
        (["--samples", "short-logits.npz"], "8 rows of logits, 9 of features"),
        (["--samples", "flat-logits.npz"], "logits are float64 \\[9\\]; expected \\[N, D\\] of numbers"),
        (["--samples", "words.npz"], "features are <U1 \\[9, 5\\]; expected"),
        (["--samples", "narrow.npz", "--real", "words-real.npz"], "mu is \\[7\\] .* of numbers"),
    ],
)
def test_bad_input(meta, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    network(tmp_path / "judge.onnx")
    np.savez("pictures.npz", arr_0=pictures(0, 3))
    np.savez("floats.npz", arr_0=np.zeros((3, 64, 64, 3)))
    np.savez("other.npz", other=np.zeros(3))
    np.save("array.npy", np.zeros((9, 5)))
    np.savez("flat.npz", features=np.zeros(3))
    np.savez("narrow.npz", features=np.zeros((9, 5)))
    np.savez("short-logits.npz", features=np.zeros((9, 5)), logits=np.zeros((8, 3)))
    np.savez("flat-logits.npz", features=np.zeros((9, 5)), logits=np.zeros(9))
    np.savez("words.npz", features=np.full((9, 5), "a"))
    np.savez("words-real.npz", mu=np.full(7, "a"), sigma=np.eye(7))
    np.savez("other-width.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez("no-square.npz", mu=np.zeros(7), sigma=np.ones(7))
    Path("text.npz").write_text("no")
    assert main(["regress", str(meta.bundle), "--threads", "1", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dit-export: error: ")
    assert re.search(message, error), error
