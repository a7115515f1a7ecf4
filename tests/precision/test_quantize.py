"""Int8: calibration along a real run, a fold that changes nothing, Q/DQ on the GEMMs, and what each part is for."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from dit_export.cli import main
from dit_export.graph import onnxfile, trace
from dit_export.passes.dynamic import dynamic
from dit_export.precision.calibrate import Calibration, Plan, Watcher, calibrate
from dit_export.precision.layers import find
from dit_export.precision.qdq import quantize
from dit_export.precision.smooth import choose, smooth, vector_divisors
from dit_runtime import backends
from dit_runtime.backends import Options
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from dit_runtime.pipeline import Pipeline
from tests.precision.conftest import PLAN, SPEC


def pair(bundle: Path) -> tuple[gs.Graph, gs.Graph]:
    return onnxfile.load(bundle / "conditioner.onnx"), onnxfile.load(bundle / "denoiser.onnx")


def predictions(
    bundle: Path, conditioner: gs.Graph, denoiser: gs.Graph, folder: Path, backend="onnxruntime"
) -> np.ndarray:
    """Conditional and null rows over the schedule, before guidance."""
    module, engines = backends.backend(backend), {}
    for name, graph in (("conditioner", conditioner), ("denoiser", denoiser)):
        files = onnxfile.save(graph, folder / f"{name}.onnx")
        engines[name] = module.open([folder / file for file in files], Options(threads=1))
    with Pipeline(bundle, manifest.read(bundle), engines) as pipe:
        times = np.array([999, 700, 400, 100, 10], np.float32).repeat(2)
        labels = np.array([3, SPEC.null_label] * 5)
        noise = np.random.default_rng(7).normal(size=(10, 4, 8, 8)).astype(np.float32)
        rows = pipe.condition(times, labels)
        ones = np.ones(4, np.float32)
        parts = [slice(0, 4), slice(4, 8), slice(8, 10)]
        return np.concatenate([pipe.denoise(noise[p], rows[p][None], ones[: len(rows[p])])[0] for p in parts])


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_the_layers_are_found_by_structure(bundle) -> None:
    names = [one.name for one in find(pair(bundle)[1])]
    assert names == [f"block {n} {kind}" for n in range(3) for kind in ("qkv", "proj", "fc1", "fc2")]


def test_calibration_looks_on_and_changes_nothing(bundle, calibration) -> None:
    again = calibrate(bundle, PLAN, lambda done, total: None)
    for name, seen in calibration.layers.items():
        np.testing.assert_array_equal(seen.largest, again.layers[name].largest)  # seeded
        np.testing.assert_array_equal(seen.sample, again.layers[name].sample)
        assert (np.abs(seen.sample).max(axis=0) <= seen.largest * 1.001).all()  # the sample is kept in float16
        assert 100 < len(seen.sample) <= 256
    outlying = calibration.layers["block 1 fc1"].largest
    assert outlying.max() > 5 * np.median(outlying)


def test_both_halves_of_guidance_are_seen() -> None:
    """A watcher on an engine that echoes what it was asked: both groups reach the sample, and are finite there."""

    class Echo:
        io = (("conditioning",), ("prediction", "layer/largest", "layer/sample"))

        def run(self, inputs):
            rows = inputs["conditioning"].reshape(-1, 1, 1)
            return {"prediction": rows, "layer/largest": rows.max(axis=(0, 1)), "layer/sample": rows}

        def close(self) -> None: ...

    watcher = Watcher(Echo(), ["layer"], 8, np.random.default_rng(0))
    assert watcher.io[1] == ("prediction",)
    groups = np.stack([np.full((4, 1, 1), 1.0), np.full((4, 1, 1), 1e6)])
    assert watcher.run({"conditioning": groups}).keys() == {"prediction"}
    assert sorted(set(watcher.seen()["layer"].sample.ravel().tolist())) == [1.0, 65504.0]  # float16's end


def test_the_fold_changes_no_answer_and_adds_no_op_to_the_loop(bundle, calibration, tmp_path) -> None:
    before = pair(bundle)
    expected = predictions(bundle, *before, tmp_path)
    conditioner, denoiser = pair(bundle)
    once, every_step = (onnxfile.census(graph) for graph in (conditioner, denoiser))
    chosen = smooth(conditioner, denoiser, calibration)
    assert onnxfile.census(denoiser) == every_step
    assert onnxfile.census(conditioner) == once | {"Mul": once["Mul"] + 4 * 3}  # a gain and a shift twice a block
    assert {name for name, choice in chosen.items() if choice.alpha == 0} == {f"block {n} fc2" for n in range(3)}
    assert error(predictions(bundle, conditioner, denoiser, tmp_path), expected) <= 1e-5
    # Teeth: the folded denoiser with the old conditioner is another function.
    assert error(predictions(bundle, before[0], denoiser, tmp_path), expected) > 1e-2

    table = vector_divisors(denoiser, chosen, SPEC.hidden)
    moved = np.flatnonzero((table != 1).any(axis=1))
    assert moved.tolist() == sorted(6 * n + k for n in range(3) for k in (0, 1, 3, 4))  # gains and shifts, no gates


def test_the_trajectory_is_what_calibration_is_for(bundle, calibration, tmp_path) -> None:
    """Ranges seen at two timesteps for one class do not hold for all of them."""
    short = calibrate(bundle, Plan(pictures=1, steps=2, batch=1), lambda done, total: None)
    expected, errors = predictions(bundle, *pair(bundle), tmp_path), []
    for seen in (short, calibration):
        conditioner, denoiser = pair(bundle)
        quantize(denoiser, smooth(conditioner, denoiser, seen))
        errors.append(error(predictions(bundle, conditioner, denoiser, tmp_path), expected))
    assert errors[1] < errors[0]


def test_q_and_dq_stand_around_the_token_gemms_only(bundle, calibration, tmp_path) -> None:
    conditioner, denoiser = pair(bundle)
    plain, size = onnxfile.census(denoiser), onnxfile.weight_bytes(denoiser)
    chosen = smooth(conditioner, denoiser, calibration)
    assert quantize(denoiser, chosen, keep=["block 0 fc2", "block 2 qkv"]) == 10
    census = onnxfile.census(denoiser)
    assert (census["QuantizeLinear"], census["DequantizeLinear"]) == (10, 20)
    assert {op: n for op, n in census.items() if "Linear" not in op} == plain
    conditioner, denoiser = pair(bundle)
    quantize(denoiser, smooth(conditioner, denoiser, calibration))
    assert onnxfile.weight_bytes(denoiser) < 0.32 * size
    files = onnxfile.save(denoiser, tmp_path / "a.onnx")
    form = denoiser.copy()
    assert dynamic(form) == 12 and "QuantizeLinear" not in onnxfile.census(form)
    assert dynamic(pair(bundle)[1]) == 0
    assert onnxfile.save(form, tmp_path / "b.onnx")[1:] == files[1:]  # the int8 weights are there once


def test_choose_prefers_less_error() -> None:
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(64, 32)).astype(np.float32)
    sample[:, 3] *= 50
    from dit_export.precision.calibrate import Seen

    seen = Seen(np.abs(sample).max(axis=0), sample)
    weight = rng.normal(size=(32, 16)).astype(np.float32)
    plain, smoothed = choose(seen, weight, smooth=False), choose(seen, weight, smooth=True)
    assert smoothed.error < 0.5 * plain.error and smoothed.divisors[3] == smoothed.divisors.max()


def test_a_calibration_is_kept_and_read_again(calibration, tmp_path) -> None:
    calibration.save(tmp_path / "c.npz")
    again = Calibration.load(tmp_path / "c.npz")
    assert again.layers.keys() == calibration.layers.keys()
    np.testing.assert_array_equal(again.layers["block 2 fc2"].sample, calibration.layers["block 2 fc2"].sample)
    whole, array = (tmp_path / "c.npz").read_bytes(), io.BytesIO()
    np.save(array, np.zeros(3))
    for content in (b"no", b"", whole[: len(whole) // 2], whole[:200] + bytes(50) + whole[250:], array.getvalue()):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(UsageError, match="not a calibration"):
            Calibration.load(tmp_path / "x.npz")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_int8_bundle(shared_embedders, narrow, tmp_path, capsys, one_thread, backend) -> None:
    options = ["--checkpoint", str(shared_embedders.checkpoint), "--precision", "int8", "--backend", backend]
    bundle = narrow("int8", backend)
    contract = manifest.read(bundle)
    decoder = "bf16" if backend == "openvino" else "fp32"
    assert {name: graph.precision for name, graph in contract.graphs.items()} == {
        "conditioner": "fp32",
        "denoiser": "int8",
        "update": "fp32",
        "decoder": decoder,
    }
    assert main(["verify", str(bundle)]) == 0

    seen = bundle.with_name(f"{bundle.name}.calibration.npz")
    with one_thread():
        again = ["--calibration", str(seen), "-o", str(tmp_path / "again"), "--max-batch", "2"]
        assert main(["build", *options, *again]) == 0
    for name in ("conditioner.onnx", "denoiser.onnx"):
        first, second = (
            [t.values for t in onnxfile.constants(onnxfile.load(folder / name))]
            for folder in (bundle, tmp_path / "again")
        )
        assert all(np.allclose(one, other, rtol=1e-3) for one, other in zip(first, second, strict=True))


def test_a_calibration_of_another_network(meta, calibration, tmp_path, capsys) -> None:
    calibration.save(tmp_path / "c.npz")
    options = ["--heads", "4", "--latents-only", "--precision", "int8", "--calibration", str(tmp_path / "c.npz")]
    assert main(["build", "--checkpoint", str(meta.checkpoint), "-o", str(tmp_path / "x"), *options]) == 2
    assert "96 channels, expected 64" in capsys.readouterr().err
    assert json.dumps([*tmp_path.iterdir()], default=str).count("partial") == 0
    assert trace.OPSET >= 21  # int8 Q/DQ with an axis
