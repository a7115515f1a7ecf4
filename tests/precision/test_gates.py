"""int8 builds whose gates fail: the fewest layers stay float, or one sentence says why none would help."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import dit_runtime.verify
from dit_export.bundle import build
from dit_export.checkpoints import Loaded
from dit_export.checkpoints.diffusers import read_process
from dit_export.cli import main, parser
from dit_export.cli.recipe import read_recipe
from dit_export.graph import onnxfile
from dit_export.networks import Network
from dit_export.precision import search
from dit_export.recipe import Recipe
from dit_export.verify.check import Built
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Port
from dit_runtime.progress import Progress
from dit_runtime.verify import Figure
from tests.conftest import HEADS, META_DEPTH, meta_state
from tests.precision.test_unconditional import Tokens

HOT = 300.0  # of one channel between GELU and fc2, where the others are around 1
LAYERS = 4 * META_DEPTH


@pytest.fixture(scope="module")
def hot(tmp_path_factory) -> Path:
    """A checkpoint whose first block has a large, constant channel before fc2, which no smoothing reaches."""
    state = meta_state()
    state["blocks.0.mlp.fc2.weight"] *= 3
    state["blocks.0.mlp.fc1.weight"][0] *= 0.1
    state["blocks.0.mlp.fc1.bias"][0] = HOT
    share = state["blocks.0.mlp.fc2.weight"][:, 0] * F.gelu(torch.tensor(HOT))
    state["blocks.0.mlp.fc2.bias"] -= share
    path = tmp_path_factory.mktemp("hot") / "checkpoint.pt"
    torch.save({"ema": state}, path)
    return path


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> dict[str, object]:
    return {"folder": tmp_path_factory.mktemp("trace")}


@pytest.fixture
def run(hot, traces, tmp_path, monkeypatch, capsys, one_thread):
    """Build the checkpoint in int8 on ONNX Runtime; it is traced once."""
    trace = build.trace_graphs

    def once(folder: Path, *inputs: object) -> object:
        if "oracle" not in traces:
            traces["oracle"] = trace(traces["folder"] / "plain", *inputs)
        shutil.copytree(traces["folder"] / "plain", folder)
        return traces["oracle"]

    monkeypatch.setattr(build, "trace_graphs", once)

    def command(*options: str, verb: str = "build") -> tuple[int, str]:
        checkpoint = ["--checkpoint", str(hot), "--heads", str(HEADS), "--latents-only", "--max-batch", "2"]
        with one_thread():
            int8 = ["--precision", "int8", "--backend", "onnxruntime", "-o", str(tmp_path / "bundle")]
            code = main([verb, *checkpoint, *int8, *options])
        return code, capsys.readouterr().out

    return command


def test_the_layer_that_breaks_a_gate_stays_float(run, tmp_path, capsys) -> None:
    code, text = run()
    assert code == 0 and not (tmp_path / "bundle.failed").exists()
    bundle = tmp_path / "bundle"
    contract = manifest.read(bundle)
    assert contract.parity["passed"] and contract.source["recipe"]["keep_float"] == ["blocks.0.mlp.fc2"]
    cost = contract.built_with["kept_float"]
    assert (cost["layers"], cost["of"]) == (["blocks.0.mlp.fc2"], LAYERS) and cost["step_time"] > 0
    gate = next(gate for gate in cost["gates"] if gate["name"] == "denoiser: unguided, rel-L2")
    assert gate["after"] <= gate["limit"] < gate["before"]

    said = f"in float, so that these limits hold: blocks.0.mlp.fc2 (1 of {LAYERS} layers)"
    assert said in text and "denoiser: unguided, rel-L2: " in text and "a guided step takes " in text
    assert said in (bundle / "report.html").read_text()
    table = json.loads((bundle / "sensitivity.json").read_text())
    assert [entry["layer"] for entry in table if entry["kept"]] == ["blocks.0.mlp.fc2"] and len(table) == LAYERS
    assert contract.built_with["passes"]["denoiser"]["quantize"] == LAYERS - 1
    assert onnxfile.census(onnxfile.load(bundle / "denoiser.onnx"))["QuantizeLinear"] == LAYERS - 1
    assert (tmp_path / "bundle.calibration.npz").is_file() and len([*tmp_path.iterdir()]) == 2  # with the bundle
    assert main(["verify", str(bundle)]) == 0


def test_a_strict_build_searches_nothing(run, tmp_path) -> None:
    code, text = run("--strict")
    assert code == 1 and "without --strict the build keeps the fewest that the gates need" in text
    contract = manifest.read(tmp_path / "bundle.failed")
    assert contract.source["recipe"]["keep_float"] is None and "sensitivity.json" not in contract.files


def test_a_network_that_needs_every_layer_in_float(tmp_path, one_thread) -> None:
    """Both of its layers read a large channel that their weights ignore, and no smoothing reaches either."""
    torch.manual_seed(0)
    module = Tokens().eval().requires_grad_(False)
    for bias, linear in ((module.time.bias, module.mlp[0]), (module.mlp[0].bias, module.mlp[2])):
        bias[0] = 100 * HOT
        linear.weight *= 4
        linear.weight[:, 0] = 0
    ports = (Port("x", "state", "float32", (6, 8)), Port("t", "time", "float32", ()))
    network = Network(module, ports, model={"name": "tokens"})
    loaded = Loaded(network, None, (), read_process(None, False), {"kind": "python"})
    recipe = Recipe(precision="int8", backend="onnxruntime", output=str(tmp_path / "bundle"))
    with one_thread():
        built = build.build(recipe, Progress(io.StringIO()), loaded=loaded)
    assert not built.passed and built.folder.name == "bundle.failed"
    assert not manifest.read(built.folder).parity["passed"]
    assert "int8's gate holds on onnxruntime with no layer in int8 only: with mlp." in built.advice
    assert "alone in it, denoiser: prediction, rel-L2" in built.advice
    assert "try --precision fp32 or --precision fp16" in built.advice


def test_a_gate_that_float_breaks_too(run, monkeypatch) -> None:
    none = replace(dit_runtime.verify.TOLERANCES["int8"], latents=0.0)
    monkeypatch.setitem(dit_runtime.verify.TOLERANCES, "int8", none)
    code, text = run()
    assert code == 1 and "does not hold on onnxruntime even with every layer in float: run: latents, rel-L2" in text
    commands = re.findall("^next: dit-export (.*)$", text, re.MULTILINE)
    recipes = [read_recipe(parser().parse_args(shlex.split(command))) for command in commands]
    assert {recipe.precision for recipe in recipes} == {"fp32", "fp16", "bf16"} and recipes[0].latents_only


def test_two_searches_leave_one_record(run, tmp_path, monkeypatch) -> None:
    """A kind stays float for its speed, then a layer for a gate."""
    ratios = chain([1.5, 0.9, 0.9, 0.9], repeat(1.1))
    monkeypatch.setattr(search, "_ratio", lambda slow, fast: next(ratios))
    code, text = run("--tune", verb="quantize")
    assert code == 0 and "in float: attn.qkv, blocks.0.mlp.fc2" in text
    table = json.loads((tmp_path / "bundle" / "sensitivity.json").read_text())
    why = {entry["layer"]: entry["why"] for entry in table if entry["kept"]}
    assert why.keys() == {"blocks.0.mlp.fc2", *(f"blocks.{n}.attn.qkv" for n in range(META_DEPTH))}
    assert (
        why["blocks.0.attn.qkv"] == "float attn.qkv is 1.50 times as fast a step"
        and "with it in int8" in why["blocks.0.mlp.fc2"]
    )


def test_a_search_without_room_keeps_the_bundle(run, tmp_path, monkeypatch) -> None:
    usage = build.shutil.disk_usage(tmp_path)
    free = chain([usage], repeat(usage._replace(free=0)))  # the build has room, the search has none
    monkeypatch.setattr(build.shutil, "disk_usage", lambda path: next(free))
    code, text = run()
    assert code == 1 and (tmp_path / "bundle.failed" / "manifest.json").is_file()
    assert "0.0 GB free" in text and "make it, and build again" in text


def test_a_second_failure_names_the_next_step(run, monkeypatch) -> None:
    verify, count = build.Making.verify, iter((0, 1))
    failed = Figure("run", "latents, rel-L2", 9.0, 0.5)
    monkeypatch.setattr(
        build.Making, "verify", lambda making: replace(verify(making), **{"checks": [failed]} if next(count) else {})
    )
    code, text = run()
    assert code == 1 and "with blocks.0.mlp.fc2 in float a gate still fails: run: latents, rel-L2: 9" in text
    assert "try --precision fp32" in text


@pytest.mark.parametrize(("kind", "advice"), [("int8", "--keep-float decoder, or try"), ("fp32", "in fp32: try")])
def test_a_decoder_that_fails_alone(kind, advice) -> None:
    """No layer of the denoiser is tried for it."""
    assembly = SimpleNamespace(backend="onnxruntime", recipe=Recipe())
    end = SimpleNamespace(name="decoder", precision=kind)
    making = SimpleNamespace(assembly=assembly, contract=SimpleNamespace(step=end, end=end))
    checks = [Figure("denoiser", "prediction", 0.1, 0.5), Figure("decoder", "PSNR", 30.0, 40.0, at_least=True)]
    built = build._within_gates(making, Built(Path(), [], checks, None, None))
    assert not built.passed and advice in built.advice and "--precision fp16" in built.advice
    in_float = [change["keep_float"] for change in built.changes if change.get("keep_float")]
    assert in_float == ([["decoder"]] if kind == "int8" else [])
