"""Reference, proof and parity of networks with any ports: the gate needs no name of a network, a block or a stage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from dit_export.checkpoints import Loaded
from dit_export.verify import localize, traced
from dit_export.verify.check import check
from dit_export.verify.gate import Result, Settings, gate
from dit_export.verify.reference import load_divisors, save_reference
from dit_runtime.bundle import manifest
from dit_runtime.errors import BundleError
from dit_runtime.progress import Progress
from dit_runtime.verify import load_reference
from tests.tamper import seal
from tests.verify import tiny


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, one_thread) -> dict[str, tiny.Bundle]:
    folder = tmp_path_factory.mktemp("tiny")
    with one_thread():
        return {kind: tiny.write(folder / kind, tiny.network(kind, kind == "labels")) for kind in tiny.KINDS}


def read_traced(folder: Path) -> traced.Traced:
    return traced.read(folder, manifest.read(folder))


def loaded(bundle: tiny.Bundle) -> Loaded:
    return Loaded(bundle.network, None, (), manifest.read(bundle.folder).process, {"kind": "synthetic"})


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_bundle_of_any_ports_passes(bundles, kind, one_thread):
    bundle = bundles[kind]
    with one_thread():
        built = check(bundle.folder, loaded(bundle), None, Progress(), threads=1)
    assert built.passed and built.sensitive, [str(figure) for figure in built.checks if not figure.passed]
    names = {figure.metric for figure in built.proof}
    asked = {"another condition, rel-L2", "guidance x 2, rel-L2"}
    assert names == {"t moved by 5 %, rel-L2"} | (asked if kind != "alone" else set())
    assert {figure.where for figure in built.checks if "at a batch" in figure.metric} == {"batch 1", "batch 4"}


@pytest.mark.parametrize(("kind", "rows"), [("labels", tiny.CLASSES + 1), ("prompt", 3), ("both", 3), ("alone", 3)])
def test_the_reference_holds_its_conditions(bundles, kind, rows):
    bundle = bundles[kind]
    contract = manifest.read(bundle.folder)
    reference = load_reference(bundle.folder, contract)
    for name, expected in bundle.reference.condition.items():
        assert np.array_equal(reference.condition[name], expected)
        assert reference.negative is not None and len(reference.negative[name]) == 1
    alone = kind == "alone"
    assert len(reference.fingerprint) == rows and reference.guidance.tolist() == ([1, 1] if alone else [4, 1.5])
    assert (reference.negative is None) == alone == (reference.null.size == 0)


def test_each_condition_has_its_own_fingerprint(bundles):
    for kind in ("labels", "prompt", "both"):
        prints = bundles[kind].reference.fingerprint
        assert len({row.tobytes() for row in prints}) == len(prints)
    prints = bundles["alone"].reference.fingerprint
    np.testing.assert_allclose(prints, prints[:1].repeat(3, 0), rtol=1e-6)


def test_divisors_go_round(bundles, tmp_path):
    """They are stored once a tensor, and PyTorch's fingerprint is divided by them."""
    bundle = bundles["prompt"]
    packs = read_traced(bundle.folder).packs
    by_name = {pack.name: pack for pack in packs}
    assert list(by_name) == ["context", "context_1", "modulation"] and by_name["context"].sizes == (tiny.WORDS,) * 4
    divisors = {"context": np.repeat(np.arange(1, 5, dtype=np.float32), tiny.WORDS)[:, None] * np.ones(tiny.WIDTH)}
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    save_reference(tmp_path / "bundle", bundle.reference, packs, divisors)
    seal(tmp_path / "bundle")
    back = load_divisors(tmp_path / "bundle", manifest.read(tmp_path / "bundle"), packs)
    assert set(back) == {"context"} and np.array_equal(back["context"], divisors["context"])
    load_reference(tmp_path / "bundle", manifest.read(bundle.folder))


def test_places_are_modules(bundles):
    places = read_traced(bundles["both"].folder).places
    expected = {f"blocks.{n}.{part}" for n in (0, 1) for part in ("attn", "cross", "mlp", "modulation", "cross.kv")}
    assert set(places.values()) == expected


def run_gate(bundle: Path, monkeypatch, truth: tiny.Bundle, against: bool = False) -> Result:
    """The gate with reference.npz; PyTorch's network is at hand to localize, or the sound bundle is."""
    monkeypatch.setattr("dit_export.checkpoints.load_source", lambda *_: loaded(truth))
    monkeypatch.setattr(localize, "trace", lambda *_: localize.PyTorch(truth.network, truth.oracle))
    settings = Settings(bundle, weights=False, against=truth.folder if against else None, threads=1)
    return gate(settings, Progress())


def damage(bundle: tiny.Bundle, folder: Path, stage: str, change: Callable[[onnx.ModelProto], None]) -> Path:
    shutil.copytree(bundle.folder, folder)
    path = folder / f"{stage}.onnx"
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    seal(folder)
    return folder


def scale(name: str, factor: float, rows: slice = slice(None)) -> Callable[[onnx.ModelProto], None]:
    """Change the rows of one weight."""

    def change(model: onnx.ModelProto) -> None:
        (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        values = onnx.numpy_helper.to_array(weight).copy()
        values[rows] *= factor
        weight.CopyFrom(onnx.numpy_helper.from_array(values, name))

    return change


def weight_before(model: onnx.ModelProto, tensor: str) -> str:
    """The weight of the nearest product before a tensor."""
    producers = {name: node for node in model.graph.node for name in node.output}
    stack = [tensor]
    while stack:
        node = producers.get(stack.pop(0))
        if node is None:
            continue
        weights = {weight.name: len(weight.dims) for weight in model.graph.initializer}
        if node.op_type in ("MatMul", "Gemm") and weights.get(node.input[1]) == 2:
            return str(node.input[1])
        stack += node.input
    raise AssertionError(tensor)


@pytest.mark.parametrize("against", [False, True], ids=["PyTorch", "another bundle"])
@pytest.mark.parametrize(
    ("kind", "place"), [("prompt", "blocks.1.cross"), ("labels", "blocks.0.mlp"), ("alone", "blocks.1.attn")]
)
def test_a_broken_branch_is_named(bundles, kind, place, against, tmp_path, monkeypatch):
    bundle = bundles[kind]
    (total,) = [name for name, path in read_traced(bundle.folder).places.items() if path == place]

    def change(model: onnx.ModelProto) -> None:
        (add,) = [node for node in model.graph.node if total in node.output]
        stream = set(read_traced(bundle.folder).places)
        branch = next(name for name in add.input if name not in stream and not name.endswith("_rows"))
        scale(weight_before(model, branch), 2)(model)

    result = run_gate(damage(bundle, tmp_path / "bundle", "denoiser", change), monkeypatch, bundle, against)
    assert result.first is not None and (result.first.stage, result.first.step) == ("denoiser", 1)
    (sentence,) = result.located
    assert sentence.startswith(f"denoiser: first moved: {place} (residual sum ")
    errors = [error for name, error in result.taps]
    broken = next(n for n, (name, _) in enumerate(result.taps) if name.startswith(place))
    assert max(errors[:broken]) < 1e-5 < 1e-3 < min(errors[broken:])


def test_a_wrong_null_row(bundles, tmp_path, monkeypatch):
    bundle = bundles["labels"]

    def change(model: onnx.ModelProto) -> None:
        (table,) = [w.name for w in model.graph.initializer if tuple(w.dims) == (tiny.CLASSES + 1, tiny.WIDTH)]
        scale(table, 2, slice(tiny.CLASSES, None))(model)

    result = run_gate(damage(bundle, tmp_path / "bundle", "conditioner", change), monkeypatch, bundle)
    assert result.first is not None and result.first.name == "conditioner: fingerprint of the null, rel-L2"
    assert result.first.where == f"the null (labels {tiny.CLASSES})"
    assert len(result.located) == 1  # the denoiser, which reads the right tensors, is right
    assert result.located[0].startswith("conditioner: every tensor of conditioning, for the null (labels 7)")


def test_tensors_of_a_stage_are_named(bundles, tmp_path, monkeypatch):
    """One block's keys and values of the context, and a bias of the other block's modulation."""
    bundle = bundles["prompt"]
    packs = {pack.name: pack for pack in read_traced(bundle.folder).packs}
    keys = packs["context"].tensors[2]

    def change(model: onnx.ModelProto) -> None:
        scale(weight_before(model, keys), 1.5, slice(None))(model)

    broken = damage(bundle, tmp_path / "context", "context", change)
    result = run_gate(broken, monkeypatch, bundle)
    assert result.first is not None and result.first.where == "every condition: stale, or of other weights"
    (sentence,) = result.located
    names = "context 3 of 4 (blocks.1.cross.kv); context 4 of 4 (blocks.1.cross.kv)"
    assert sentence.startswith(f"context: {names}, for every condition asked")


def test_two_faults_at_once(bundles, tmp_path, monkeypatch):
    bundle = bundles["prompt"]
    time = [n for n in onnx.load(bundle.folder / "modulation.onnx").graph.initializer if tuple(n.dims) == (16, 16)]
    broken = damage(bundle, tmp_path / "bundle", "modulation", scale(time[0].name, 1.5))
    model = onnx.load(broken / "denoiser.onnx")
    (total,) = [name for name, path in read_traced(broken).places.items() if path == "blocks.1.mlp"]
    (add,) = [node for node in model.graph.node if total in node.output]
    scale(weight_before(model, add.input[1]), 2)(model)
    onnx.save(model, broken / "denoiser.onnx")
    seal(broken)
    result = run_gate(broken, monkeypatch, bundle)
    assert [sentence.partition(":")[0] for sentence in result.located] == ["modulation", "denoiser"]
    assert "blocks.1.mlp" in result.located[1]


def test_nothing_to_localize_with(bundles, tmp_path, monkeypatch):
    """The stage and the step are still named."""
    bundle = bundles["alone"]
    (weight, *_) = [w.name for w in onnx.load(bundle.folder / "denoiser.onnx").graph.initializer if len(w.dims) == 2]
    broken = damage(bundle, tmp_path / "bundle", "denoiser", scale(weight, 2))
    (broken / traced.NAME).write_text("{}")
    seal(broken)
    result = run_gate(broken, monkeypatch, bundle)
    assert result.first is not None and result.first.stage == "denoiser"
    assert result.located[0].startswith("not localized: ") and "traced.json cannot be read" in result.located[0]


@pytest.mark.parametrize("name", [traced.NAME, "reference.npz"])
def test_what_locates_is_the_bundles_own(bundles, tmp_path, monkeypatch, name):
    """A file that was changed is not read, and no link is followed."""
    bundle = bundles["labels"]
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    contract, packs = manifest.read(folder), read_traced(folder).packs

    def read() -> None:
        if name == traced.NAME:
            traced.read(folder, contract)
        else:
            load_divisors(folder, contract, packs)

    read()
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match="does not have the sha256"):
        read()
    (folder / name).unlink()
    (folder / name).symlink_to(bundle.folder / name)
    with pytest.raises(BundleError, match="is a link"):
        read()


class Timed(tiny.Tiny):
    """Its loop reads the timestep itself."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = super().forward(x, t, labels).flatten(1) * t[:, None] / 500
        return (rows.reshape(-1, 1, tiny.CHANNELS, tiny.TOKENS) * t[:, None, None, None] / 500).flatten(1, 2)


def test_a_loop_that_reads_the_timestep_is_localized(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = replace(tiny.network("labels"), module=Timed(True, False, False).eval().requires_grad_(False))
    bundle = tiny.write(tmp_path / "sound", net)
    assert "t" in {spec.name for spec in manifest.read(bundle.folder).step.grouped}
    graph = onnx.load(bundle.folder / "denoiser.onnx").graph
    weight = next(w.name for w in graph.initializer if tuple(w.dims) == (32, 16))
    broken = damage(bundle, tmp_path / "broken", "denoiser", scale(weight, 2))
    for against in (False, True):
        result = run_gate(broken, monkeypatch, bundle, against)
        assert not result.passed and ".mlp" in result.located[0]


def test_a_source_need_not_say_its_kind(bundles):
    bundle = bundles["labels"]
    nameless = replace(loaded(bundle), source={})
    assert check(bundle.folder, nameless, None, Progress(), threads=1).passed
