"""Tests of which layers stay float: the worst until a budget holds, named ones, and those of a recipe.

That recipe builds the same again.
"""

from __future__ import annotations

import json
import tomllib
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper
from onnxruntime import InferenceSession

from dit_export.bundle import build
from dit_export.cli import main
from dit_export.graph import onnxfile
from dit_export.networks.families import family_network
from dit_export.precision import search
from dit_export.precision.budget import Budget, SearchOptions
from dit_export.precision.calibrate import Calibration
from dit_export.precision.layers import Layer, find, named
from dit_export.precision.portable import portable
from dit_export.precision.search import Found, LayerSensitivity, Search
from dit_export.recipe import Recipe
from dit_runtime import backends
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Stage
from dit_runtime.errors import UsageError
from dit_runtime.verify import Figure, relative_error
from tests.networks import tiny
from tests.precision.conftest import PLAN, open_search, scratch

RUINED = "blocks.1.mlp.fc2"
KINDS = ("attn.qkv", "attn.attention", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture
def opened(bundle, tmp_path):
    """Open the search of an int8 build of the bundle's network."""
    return lambda *which: open_search(tmp_path / f"copy-{len([*tmp_path.iterdir()])}", bundle, *which)


@pytest.fixture
def searched(opened):
    """Search once."""

    def run(calibration: Calibration, backend: str, options: SearchOptions, fixed: tuple[str, ...] = ()) -> Found:
        with opened(calibration, backend) as tried:
            return tried.run(options, fixed)

    return run


def values(outcome: Found) -> list[float]:
    """Return the values with which the budget held."""
    reasons = dict.fromkeys(entry.why for entry in outcome.layers if " holds: " in entry.why)
    return [float(text.split(": ")[1]) for text in reasons]


def test_a_search_leaves_nothing(calibration, opened, tmp_path, monkeypatch) -> None:
    engines, closed, module = [], [], backends.backend("onnxruntime")
    opening, closing = module.open, module.OrtEngine.close
    with pytest.raises(KeyboardInterrupt), opened(calibration, "onnxruntime") as tried:
        folder = tried._folder
        monkeypatch.setattr(module, "open", lambda *which: engines.append(opening(*which)) or engines[-1])
        monkeypatch.setattr(module.OrtEngine, "close", lambda engine: closed.append(engine) or closing(engine))
        with tried._opened([], "int8"):
            raise KeyboardInterrupt
    assert len(engines) == 1 and len({*map(id, closed)}) == 2  # the conditioner's was opened before
    assert not (folder / "search").exists() and not [*folder.glob("**/tried-*")]


def test_fp8_is_tried_in_the_portable_graph(calibration, opened) -> None:
    """ONNX Runtime would fuse its Q and DQ to products that only int8 has."""
    with opened(calibration, "tensorrt") as tried:
        tried._kind = "fp8"
        with tried._opened([], "fp8") as narrow, tried._opened(tried.names, "fp32") as exact:
            error = relative_error(*(tried._step(pipe)()[0] for pipe in (narrow, exact)))
    assert 1e-3 < error < 0.2


def test_names_of_layers(bundle) -> None:
    layers = find(bundle.graphs()["denoiser"])
    assert named(layers, []) == []
    assert named(layers, ["fc1", "blocks.0.mlp.fc1"]) == [f"blocks.{n}.mlp.fc1" for n in range(3)]
    assert named(layers, ["blocks.2"]) == [f"blocks.2.{kind}" for kind in KINDS]
    with pytest.raises(UsageError, match=r"'blocks\.1\.fc1' is not in this network"):
        named(layers, ["blocks.1.fc1"])


def test_the_layer_that_int8_ruins_is_the_one_kept(calibration, searched) -> None:
    """One was seen with values a hundred times too large, so its grid is too coarse for what it really gets.

    TensorRT's engines do not run here, so the portable graph answers for them.
    """
    usual = searched(calibration, "tensorrt", SearchOptions(Budget("latent-rel-l2", 10.0)))
    assert usual.keep == []
    limit = 1.5 * values(usual)[0]
    layer = calibration.layers[RUINED]
    misled = replace(calibration, layers={**calibration.layers, RUINED: replace(layer, largest=100 * layer.largest)})
    outcome = searched(misled, "tensorrt", SearchOptions(Budget("latent-rel-l2", limit)))
    assert outcome.keep == [RUINED]
    errors = {entry.layer: entry.error for entry in outcome.layers}
    assert errors.pop(RUINED) > 2 * max(errors.values())
    (why,) = [entry.why for entry in outcome.layers if entry.kept]
    ((gate,),) = [outcome.cost["gates"]]
    assert gate["after"] <= limit < gate["before"] and "with it in int8" in why


def test_the_worst_are_kept_and_no_more_than_needed(calibration, searched) -> None:
    """ONNX Runtime's own form, activations measured as they come; a layer the recipe names is kept besides."""
    fixed = ("blocks.0.attn.proj",)
    free = searched(calibration, "onnxruntime", SearchOptions(Budget("latent-rel-l2", 10.0)), fixed)
    assert free.keep == [*fixed]
    # Far below: on busy machines the same run differs by a tenth, for one rounding that falls otherwise moves the rest.
    outcome = searched(calibration, "onnxruntime", SearchOptions(Budget("latent-rel-l2", 0.7 * values(free)[0])), fixed)
    assert outcome.keep[0] == "blocks.0.attn.proj" and 2 <= len(outcome.keep) < len(outcome.layers)
    by_error = sorted(outcome.layers, key=lambda entry: -entry.error)
    worst = [entry.layer for entry in by_error if entry.layer != "blocks.0.attn.proj"]
    assert outcome.keep[1:] == worst[: len(outcome.keep) - 1]
    assert {entry.layer for entry in outcome.layers if entry.kept} == set(outcome.keep)
    assert next(entry.why for entry in outcome.layers if entry.layer == "blocks.0.attn.proj") == "the recipe keeps it"


def test_fewer_tokens_stay_float_first() -> None:
    """Two layers have one error; that of the prompt's 4 tokens costs less in float than that of the image's 16."""

    def layer(name: str, tokens: int) -> Layer:
        x = gs.Variable("x", np.float32, ["rows", tokens, 8])
        return Layer(name, gs.Node("MatMul", name, inputs=[x, gs.Constant(f"{name}.weight", np.ones((8, 8)))]))

    errors = {"image": 0.02, "image worse": 0.1, "text": 0.02}
    layers = [layer(name, 4 if name == "text" else 16) for name in errors]
    tried: list[list[str]] = []

    class Stub(Search):
        def __init__(self) -> None:
            self.layers, self.names, self._kind, self._form, self._backend = layers, [*errors], "int8", "x", "y"

        def _rank(self) -> dict[str, float]:
            return errors

        @contextmanager
        def _opened(self, keep, precision):
            tried.append([*keep])
            yield keep

    for needed, keep in (({"image worse"}, ["image worse"]), ({"text"}, ["image worse", "text"])):
        tried.clear()

        def check(in_float: list[str], needed: set[str] = needed) -> list[Figure]:
            return [Figure("run", "error", float(not needed <= {*in_float}), 0.5)]

        assert Stub()._least(check, "budget", [], {}).keep == keep
        assert [*errors] in tried


def test_budgets_that_cannot_be_held(calibration, searched) -> None:
    with pytest.raises(UsageError, match="does not hold on openvino even with every layer in float"):
        searched(calibration, "openvino", SearchOptions(Budget("latent-rel-l2", 1e-4)))  # bf16 alone is beyond it
    with pytest.raises(UsageError, match="holds on onnxruntime with no layer in int8 only"):
        searched(calibration, "onnxruntime", SearchOptions(Budget("latent-rel-l2", 1e-4)))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("PSNR", "PSNR"), ("psnr=30", "psnr"), ("PSNR=-3", "-3"), ("latent-rel-l2=nan", "nan"), ("PSNR=x", "x")],
)
def test_budgets_that_are_none(text, wrong) -> None:
    with pytest.raises(UsageError, match=wrong):
        Budget.parse(text)
    for budget, good, bad in (("PSNR=30", 31, 29), ("latent-rel-l2=0.1", 0.05, np.nan)):
        assert Budget.parse(budget).figure(good).passed and not Budget.parse(budget).figure(bad).passed


def test_a_budget_in_decibels_counts_the_decoder(calibration, opened, monkeypatch) -> None:
    """The latents are those of fp32, so the bundle's decoder alone ends at a distance."""
    with opened(calibration, "onnxruntime") as tried:
        tried._decode = lambda latents: np.full((len(latents), 3, 16, 16), 0.5, np.float32)
        monkeypatch.setattr(tried._others.engines, "decode", lambda latents: tried._decode(latents) + 0.1)
        check = tried._ends_within(Budget("PSNR", 30))
        with tried._opened(tried.names, "fp32") as pipe:
            (figure,) = check(pipe)
    assert 19.5 < figure.value < 20.5 and not figure.passed


def test_the_records_of_two_searches() -> None:
    """The later one found fixed what the first one kept."""
    layers = [LayerSensitivity("a", 0.3, True, "slow"), LayerSensitivity("b", 0.2, False, "held")]
    cost = {"layers": ["a"], "of": 2, "gates": ["budget"], "step_time": 1.1}
    first = Found(["a"], layers, cost)
    again = [LayerSensitivity("a", 0.3, True, "the recipe keeps it"), LayerSensitivity("b", 0.2, True, "a gate")]
    both = first.then(Found(["a", "b"], again, {"layers": ["b"], "of": 2, "gates": ["gate"], "step_time": 1.2}))
    assert both.keep == ["a", "b"] and [layer.why for layer in both.layers] == ["slow", "a gate"]
    assert both.cost == {"layers": ["a", "b"], "of": 2, "gates": ["budget", "gate"], "step_time": 1.32}
    assert first.then(Found(["a"], again)).cost == cost


def test_what_int8_makes_no_faster_stays_float(calibration, searched, monkeypatch) -> None:
    """The figures are given: what is measured differs from machine to machine."""
    ratios = iter([1.5, 0.9, 0.8, 1.01, 1.2])
    monkeypatch.setattr(search, "_ratio", lambda slow, fast: (slow(), fast()) and next(ratios))
    outcome = searched(calibration, "openvino", SearchOptions(tune=True))
    assert outcome.keep == ["attn.qkv", "mlp.fc2"]
    assert {entry.layer for entry in outcome.layers if entry.kept} == {
        f"blocks.{n}.{kind}" for n in range(3) for kind in outcome.keep
    }
    with pytest.raises(UsageError, match="cannot time tensorrt"):
        SearchOptions(tune=True).check("tensorrt", has_decoder=True)
    with pytest.raises(UsageError, match="no decoder"):
        SearchOptions(Budget("PSNR", 30)).check("openvino", has_decoder=False)


@pytest.mark.slow
def test_the_command_writes_a_recipe_that_builds_the_same(
    shared_embedders, tmp_path, one_thread, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--checkpoint", str(shared_embedders.checkpoint), "--backend", "onnxruntime", "--max-batch", "2"]
    distances = chain([10.0], repeat(30.0))  # the budget breaks with all layers in int8, and holds without the worst
    monkeypatch.setattr(Search, "_distance", lambda *_: next(distances))
    copies, require = [], build.require_disk
    monkeypatch.setattr(build, "require_disk", lambda *which: copies.append(which[-1]) or require(*which))
    with one_thread():
        assert (
            main(["quantize", *options, "--budget", "PSNR=20", "--keep-float", "blocks.0.mlp.fc2", "-o", "first"]) == 0
        )
    table = json.loads(Path("first/sensitivity.json").read_text())
    errors = {entry["layer"]: entry["error"] for entry in table if entry["layer"] != "blocks.0.mlp.fc2"}
    worst = max(errors, key=errors.__getitem__)
    assert {entry["layer"] for entry in table if entry["kept"]} == {"blocks.0.mlp.fc2", worst}
    assert f"in float: blocks.0.mlp.fc2, {worst}" in capsys.readouterr().out
    assert copies == [4, 2] and not Path("first/search").exists()
    assert all(entry["error"] > 0 for entry in table) and len(table) == 12
    assert "Sensitivity of layers" in Path("first/report.html").read_text()
    assert "sensitivity.json" in manifest.read(Path("first")).files

    recipe = tomllib.loads(Path("first.toml").read_text())
    assert (
        recipe["keep_float"] == ["blocks.0.mlp.fc2", worst] and Recipe.from_toml(Path("first.toml")).precision == "int8"
    )
    with one_thread():
        assert main(["build", "first.toml", "-o", "again", "--calibration", "first.calibration.npz"]) == 0
    first, again = (manifest.read(Path(name)).step for name in ("first", "again"))
    assert first.files == again.files
    graph, other = (onnxfile.load(Path(name) / "denoiser.onnx") for name in ("first", "again"))
    assert onnxfile.census(graph) == onnxfile.census(other) and onnxfile.census(graph)["QuantizeLinear"] == 10


def test_recipes_as_files(tmp_path) -> None:
    recipe = Recipe(checkpoint='a "b" ü', precision="int8", keep_float=["fc2", "blocks.1.attn.qkv"], latents_only=True)
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.from_toml(path) == recipe
    path.write_text("keep-float = [1]")
    with pytest.raises(UsageError, match="expected strings"):
        Recipe.from_toml(path)


def test_a_mask_of_one_row_is_opened_on_a_cpu(tmp_path) -> None:
    """ONNX Runtime's own Attention refuses it, as the portable graph of a context with a mask has it."""
    rows = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 2, 3, 4]) for name in "qkvy"}
    mask = helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["rows", 1, 1, 3])
    nodes = [helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"])]
    graph = helper.make_graph(nodes, "context", [rows["q"], rows["k"], rows["v"], mask], [rows["y"]])
    opsets = [helper.make_opsetid("", 23)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "context.onnx")
    stage = Stage("context", "condition", (), (), "context.onnx", backend="tensorrt", engines={"tensorrt": ("x",)})
    inputs = {name: np.ones((2, 2, 3, 4), np.float32) for name in "qkv"} | {"mask": np.zeros((2, 1, 1, 3), np.float32)}

    def run(file: str) -> np.ndarray:
        return InferenceSession(tmp_path / file, providers=["CPUExecutionProvider"]).run(None, inputs)[0]

    with portable(tmp_path, stage) as form:
        assert form.backend == "onnxruntime"
        np.testing.assert_allclose(run(form.files[0]), 1, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["context.onnx"]
    with pytest.raises(Exception, match="mask"):
        run("context.onnx")


@pytest.mark.slow  # it builds a bundle
def test_a_search_for_a_gpu_opens_a_masked_context(tmp_path, one_thread) -> None:
    with one_thread():
        made = scratch(tmp_path / "bundle", family_network(tiny.z_image(), (8, 8), 32))
        calibration = made.calibrate(PLAN)
        with open_search(tmp_path / "copy", made, calibration, "tensorrt") as tried:
            assert {stage.backend for stage in tried._contract.stages} == {"onnxruntime"}
            with tried._opened([], "int8") as pipe:
                assert np.isfinite(tried._step(pipe)()[0]).all()
