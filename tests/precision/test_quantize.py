"""Int8: calibration along a real run, a fold that changes nothing, Q/DQ on the GEMMs, and what each part is for."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from dit_export.bundle import assemble
from dit_export.checkpoints import Loaded
from dit_export.checkpoints.diffusers import read_process
from dit_export.cli import main
from dit_export.graph import onnxfile, trace
from dit_export.passes.dependence import Miss
from dit_export.passes.integer_products import integer_products
from dit_export.precision import measure
from dit_export.precision.calibrate import Calibration, LayerStatistics
from dit_export.precision.layers import coverage, everything, find, kind
from dit_export.precision.measure import Plan, RecordingEngine
from dit_export.precision.qdq import quantize
from dit_export.precision.smooth import Part, choose, pack_divisors, smooth
from dit_export.recipe import Recipe
from dit_runtime.bundle import manifest
from dit_runtime.conditions.condition import Rows
from dit_runtime.errors import UsageError
from dit_runtime.progress import Progress
from tests.conftest import DIFFUSERS_DEPTH, HIDDEN, PATCH
from tests.precision.conftest import PLAN, SPEC, Scratch


def predictions(bundle: Scratch, graphs: Mapping[str, gs.Graph], folder: Path, rows: Rows | None = None) -> np.ndarray:
    """Conditional and null rows over the schedule, before guidance."""
    with bundle.open(graphs, folder, "onnxruntime") as pipe:
        times = np.array([999, 700, 400, 100, 10], np.float32)
        noise = np.random.default_rng(7).normal(size=(5, 2, *bundle.network.state.shape)).astype(np.float32)
        inputs = pipe.engines.inputs(times, rows or bundle.rows(), None, np.ones(2, np.float32))
        return np.concatenate([pipe.engines.denoise(state, inputs, step)[0] for step, state in enumerate(noise)])


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_the_layers_are_found_by_structure(bundle, captioned) -> None:
    graph = bundle.graphs()["denoiser"]
    layers = find(graph)
    assert [one.name for one in layers] == [
        f"blocks.{n}.{k}" for n in range(3) for k in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    last = SPEC.hidden * 8 * SPEC.patch**2  # the final linear's weights
    inner = SPEC.depth * 12 * SPEC.hidden**2
    assert coverage(graph, layers) == inner / (inner + last)
    own, crossed = [f"attn1.{kind}" for kind in ("to_q", "to_k", "to_v", "to_out.0")], ["attn2.to_q", "attn2.to_out.0"]
    kinds = [*own, *crossed, "ff.net.0.proj", "ff.net.2"]
    layers = find(captioned.graphs()["denoiser"])
    assert [one.name for one in layers] == [f"transformer_blocks.{n}.{kind}" for n in range(2) for kind in kinds]
    assert [kind(one.name) for one in layers if one.scores] == 2 * own[:2]
    assert everything(layers)[:4] == [
        f"transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_k", "attention", "to_v")
    ]


def test_calibration_looks_on_and_changes_nothing(bundle, calibration) -> None:
    again = bundle.calibrate(PLAN)
    for name, layer in calibration.layers.items():
        np.testing.assert_array_equal(layer.largest, again.layers[name].largest)  # seeded
        np.testing.assert_array_equal(layer.sample, again.layers[name].sample)
        assert (np.abs(layer.sample).max(axis=0) <= layer.largest * 1.001).all()  # the sample is kept in float16
        assert 100 < len(layer.sample) <= 256
    outlying = calibration.layers["blocks.1.mlp.fc1"].largest
    assert outlying.max() > 5 * np.median(outlying)


def test_both_halves_of_guidance_are_seen(tmp_path, monkeypatch) -> None:
    """On an engine that echoes its input both groups reach the sample, and are finite there."""

    class Echo:
        io = (("conditioning",), ("prediction", "layer/largest", "layer/sample"))

        def run(self, inputs):
            rows = inputs["conditioning"].reshape(-1, 1, 1)
            return {"prediction": rows, "layer/largest": rows.max(axis=(0, 1)), "layer/sample": rows}

        def close(self) -> None: ...

    class Backend:
        open = staticmethod(lambda files, options: Echo())

    monkeypatch.setattr(measure.onnxfile, "save", lambda graph, path: ())
    monkeypatch.setattr(measure.backends, "backend", lambda name: Backend)
    recorder = RecordingEngine(gs.Graph(), tmp_path / "x.onnx", 8, np.random.default_rng(0))
    assert recorder.io[1] == ("prediction",)
    groups = np.stack([np.full((4, 1, 1), 1.0), np.full((4, 1, 1), 1e6)])
    assert recorder.run({"conditioning": groups}).keys() == {"prediction"}
    sample = recorder.statistics()["layer"].sample
    assert sorted(set(sample.ravel().tolist())) == [1.0, 65504.0]  # float16's end


def test_the_fold_changes_no_answer_and_adds_no_op_to_the_loop(bundle, calibration, tmp_path) -> None:
    expected = predictions(bundle, bundle.graphs(), tmp_path)
    graphs = bundle.graphs()
    conditioner, denoiser = graphs.values()
    once, every_step = (onnxfile.census(graph) for graph in (conditioner, denoiser))
    chosen = smooth([conditioner], denoiser, calibration)
    assert onnxfile.census(denoiser) == every_step
    assert onnxfile.census(conditioner) == once | {"Mul": once["Mul"] + 4 * 3}  # a gain and a shift twice a block
    assert {name for name, choice in chosen.items() if choice.alpha == 0} == {f"blocks.{n}.mlp.fc2" for n in range(3)}
    assert error(predictions(bundle, graphs, tmp_path), expected) <= 1e-5
    # Teeth: the folded denoiser with the old conditioner is another function.
    assert error(predictions(bundle, bundle.graphs() | {"denoiser": denoiser}, tmp_path), expected) > 1e-2

    ((pack, table),) = pack_divisors(denoiser, chosen).items()
    assert pack == "conditioning" and table.shape == (SPEC.num_vectors, SPEC.hidden)
    moved = np.flatnonzero((table != 1).any(axis=1))
    assert moved.tolist() == sorted(6 * n + k for n in range(3) for k in (0, 1, 3, 4))  # gains and shifts, no gates


def test_layers_that_read_one_tensor_share_their_divisors(captioned, captioned_calibration, tmp_path) -> None:
    """A PixArt's q, k and v read one norm, and its values are made of prompts before the loop."""
    expected = predictions(captioned, captioned.graphs(), tmp_path)
    graphs = captioned.graphs()
    *before, denoiser = graphs.values()
    every_step = onnxfile.census(denoiser)
    chosen = smooth(before, denoiser, captioned_calibration)
    assert onnxfile.census(denoiser) == every_step
    for block in range(2):
        query, key, value = (chosen[f"transformer_blocks.{block}.attn1.{kind}"] for kind in ("to_q", "to_k", "to_v"))
        assert query is key is value and query.alpha > 0
        outlying = np.sort(np.argsort(-query.divisors)[:3])
        assert (
            outlying.tolist()
            == np.sort(np.argsort(-chosen[f"transformer_blocks.{block}.attn2.to_out.0"].divisors)[:3]).tolist()
        )
        assert outlying.tolist() == [5, 23, 61]
    # Nothing can be folded into what reads the residual stream as it is, or a GELU.
    assert {name for name, choice in chosen.items() if choice.alpha == 0} == {
        f"transformer_blocks.{n}.{kind}" for n in range(2) for kind in ("attn2.to_q", "ff.net.2")
    }
    assert error(predictions(captioned, graphs, tmp_path), expected) <= 1e-5
    for name in graphs.keys() - {"denoiser"}:  # teeth
        mixed = graphs | {name: captioned.graphs()[name]}
        assert error(predictions(captioned, mixed, tmp_path), expected) > 1e-2
    tables = pack_divisors(denoiser, chosen)
    assert {name: int((table != 1).any(axis=1).sum()) for name, table in tables.items()} == {
        "modulation": 2 * 2 * 2,  # gains and shifts twice a block
        "context": 2 * captioned.network.conditions[0].shape[0],  # the values of each token, a block
    }


def test_the_trajectory_is_what_calibration_is_for(bundle, calibration, tmp_path) -> None:
    """Ranges seen at two timesteps for one class do not hold for all of them: the worst row pays for it."""
    short = bundle.calibrate(Plan(pictures=1, steps=2, batch=1))
    every = [{"labels": np.array([label, SPEC.null_label])} for label in range(SPEC.num_classes)]
    expected, worst = [predictions(bundle, bundle.graphs(), tmp_path, rows) for rows in every], []
    for measured in (short, calibration):
        graphs = bundle.graphs()
        conditioner, denoiser = graphs.values()
        quantize(denoiser, smooth([conditioner], denoiser, measured))
        got = [predictions(bundle, graphs, tmp_path, rows) for rows in every]
        worst.append(max(error(*pair) for part in zip(got, expected, strict=True) for pair in zip(*part, strict=True)))
    assert worst[1] < 0.9 * worst[0]


def test_q_and_dq_stand_around_the_token_gemms_only(bundle, calibration, tmp_path) -> None:
    conditioner, denoiser = bundle.graphs().values()
    plain, size = onnxfile.census(denoiser), onnxfile.weight_bytes(denoiser)
    chosen = smooth([conditioner], denoiser, calibration)
    assert quantize(denoiser, chosen, keep=["blocks.0.mlp.fc2", "blocks.2.attn.qkv"]) == 10
    census = onnxfile.census(denoiser)
    assert (census["QuantizeLinear"], census["DequantizeLinear"]) == (10, 20)
    assert {op: n for op, n in census.items() if "Linear" not in op} == plain
    conditioner, denoiser = bundle.graphs().values()
    quantize(denoiser, smooth([conditioner], denoiser, calibration))
    assert onnxfile.weight_bytes(denoiser) < 0.32 * size
    files = onnxfile.save(denoiser, tmp_path / "a.onnx")
    form = denoiser.copy()
    assert integer_products(form) == 12
    census = onnxfile.census(form)
    assert census["MatMulIntegerToFloat"] == census["QuantizeLinear"] == 12 and "DequantizeLinear" not in census
    assert integer_products(bundle.graphs()["denoiser"]) == 0
    assert onnxfile.save(form, tmp_path / "b.onnx")[1:] == files[1:]  # the int8 weights are there once


def test_choose_prefers_less_error() -> None:
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(64, 32)).astype(np.float32)
    sample[:, 3] *= 50
    statistics = LayerStatistics(np.abs(sample).max(axis=0), sample)
    weight = rng.normal(size=(32, 16)).astype(np.float32)
    none, every = np.empty(0, np.int64), np.arange(32)
    (plain,), (smoothed,) = (choose([Part(statistics, [weight])], channels, every) for channels in (none, every))
    assert smoothed.error < 0.5 * plain.error and smoothed.divisors[3] == smoothed.divisors.max()


def test_a_calibration_is_kept_and_read_again(calibration, tmp_path) -> None:
    calibration.save(tmp_path / "c.npz")
    again = Calibration.load(tmp_path / "c.npz")
    assert again.layers.keys() == calibration.layers.keys()
    np.testing.assert_array_equal(
        again.layers["blocks.2.mlp.fc2"].sample, calibration.layers["blocks.2.mlp.fc2"].sample
    )
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
    assert {stage.name: stage.precision for stage in contract.stages} == {
        "conditioner": "fp32",
        "denoiser": "int8",
        "update": "fp32",
        "decoder": "int8",
    }
    inner = 12 * HIDDEN**2 * DIFFUSERS_DEPTH
    assert contract.built_with["quantized"] == inner / (inner + HIDDEN * 8 * PATCH**2)
    assert main(["verify", str(bundle)]) == 0

    file = bundle.with_name(f"{bundle.name}.calibration.npz")
    with one_thread():
        again = ["--calibration", str(file), "-o", str(tmp_path / "again"), "--max-batch", "2"]
        assert main(["build", *options, *again]) == 0
    for name in ("conditioner.onnx", "denoiser.onnx"):
        first, second = (
            [t.values for t in onnxfile.constants(onnxfile.load(folder / name))]
            for folder in (bundle, tmp_path / "again")
        )
        assert all(np.allclose(one, other, rtol=1e-3) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_a_bundle_holds_no_graphs_with_taps(narrow, precision) -> None:
    forms = {f"{name}{backend}.onnx" for name in ("denoiser", "decoder") for backend in ("", ".onnxruntime")}
    # The int8 decoder was searched for one backend; the fp16 denoiser's form for CUDA is the portable one.
    forms.add("denoiser.openvino.onnx" if precision == "int8" else "decoder.onnxruntime-cuda.onnx")
    plain = {"conditioner.onnx", "update.onnx"}
    weights = {f"{name}.data" for name in (*plain, "denoiser.onnx", "decoder.onnx")}
    records = {"manifest.json", "parity.json", "reference.npz", "report.html", "traced.json"}
    bundle = narrow(precision, "onnxruntime")
    assert {path.name for path in bundle.iterdir()} == forms | plain | weights | records
    assert manifest.read(bundle).files.keys() == forms | plain | weights | records - {"manifest.json"}


def test_a_wrong_count_names_what_was_refused(bundle, tmp_path, monkeypatch) -> None:
    fuse, miss = assemble.fuse, Miss("hoist", "a tensor", "a reason")
    monkeypatch.setattr(assemble, "fuse", lambda *graph: fuse(*graph)._replace(misses=(miss,)))
    network = replace(bundle.network, counts={"hoist": 99})
    loaded = Loaded(network, None, (), read_process(None, network.learned_variance), {"kind": "synthetic"})
    traced, recipe = bundle.folder.with_name("traced"), Recipe(backend="onnxruntime")
    assembly = assemble.Assembly(tmp_path, traced, loaded, None, recipe, "onnxruntime", Progress())
    with pytest.raises(RuntimeError, match="expected 99; refused: a tensor: a reason"):
        assembly.run()


def test_a_calibration_of_another_network(meta, calibration, tmp_path, capsys) -> None:
    calibration.save(tmp_path / "c.npz")
    options = ["--heads", "4", "--latents-only", "--precision", "int8", "--calibration", str(tmp_path / "c.npz")]
    assert main(["build", "--checkpoint", str(meta.checkpoint), "-o", str(tmp_path / "x"), *options]) == 2
    assert "96 channels, expected 64" in capsys.readouterr().err
    assert json.dumps([*tmp_path.iterdir()], default=str).count("partial") == 0
    assert trace.OPSET >= 21  # int8 Q/DQ with an axis
