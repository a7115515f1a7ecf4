"""Stages by what they depend on, and the fused whole: an MMDiT from diffusers, and small graphs by hand."""

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from dit_export.graph import onnxfile
from dit_export.graph.trace import OPSET
from dit_export.passes import fuse
from dit_export.passes.stages import SPLIT, Stage, split_stages
from dit_runtime.bundle.manifest import Port, TensorSpec
from dit_runtime.errors import UsageError
from tests.passes.conftest import Run, random_inputs, sensitive
from tests.passes.graphs import empty, layer
from tests.rules import linear

DEPTH, WIDTH, TOKENS = 2, 64, 10
TOLERANCE = 2e-5  # of the largest value, as for a DiT
STATE = Port("latents", "state", "float32", (16, 8, 8))
MMDIT = (
    STATE,
    Port("timesteps", "time", "float32", ()),
    Port("captions", "condition", "float32", (TOKENS, 48)),
    Port("pooled", "condition", "float32", (40,)),
)


class MMDiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = SD3Transformer2DModel(
            sample_size=8,
            num_layers=DEPTH,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=40,
            pos_embed_max_size=16,
        )

    def forward(self, latents: Tensor, timesteps: Tensor, captions: Tensor, pooled: Tensor) -> Tensor:
        return self.network(latents, captions, pooled, timesteps, return_dict=False)[0]


@pytest.fixture(scope="module")
def mmdit() -> nn.Module:
    return sensitive(MMDiT())


@pytest.fixture(scope="module")
def traced(mmdit: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = {name: torch.from_numpy(value) for name, value in random_inputs(MMDIT, 2).items()}
    rows = torch.export.Dim("rows")
    program = torch.export.export(mmdit, (), inputs, dynamic_shapes={name: {0: rows} for name in inputs}, strict=False)
    names = {"input_names": list(inputs), "output_names": ["prediction"]}
    exported = torch.onnx.export(program, kwargs=inputs, dynamo=True, opset_version=OPSET, verbose=False, **names)
    path = tmp_path_factory.mktemp("mmdit") / "mmdit.onnx"
    exported.save(path, external_data=True)
    return path


def run_stages(stages: tuple[Stage, ...], inputs: dict[str, np.ndarray], run: Run) -> dict[str, np.ndarray]:
    """Return the ports and everything that the stages give."""
    values = dict(inputs)
    for stage in stages:
        outputs = run(stage.graph, {tensor.name: values[tensor.name] for tensor in stage.graph.inputs})
        values |= dict(zip([tensor.name for tensor in stage.graph.outputs], outputs, strict=True))
    return values


def feeds(graph: gs.Graph, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {tensor.name: values[tensor.name] for tensor in graph.inputs}


def test_stages_together_are_the_whole(traced: Path, run: Run) -> None:
    graph, inputs = onnxfile.load(traced), random_inputs(MMDIT)
    (whole,) = run(graph, inputs)
    stages, denoiser, _ = split_stages(graph, MMDIT)
    values = run_stages(stages, inputs, run)
    (again,) = run(denoiser, feeds(denoiser, values))
    np.testing.assert_array_equal(again, whole)
    for name in feeds(denoiser, values).keys() - {"latents"}:  # teeth
        (broken,) = run(denoiser, feeds(denoiser, values | {name: -values[name]}))
        assert np.abs(broken - whole).max() > 1e-3 * np.abs(whole).max()


def test_an_mmdit_hands_over_vectors_and_no_tokens_that_change_every_step(traced: Path) -> None:
    fused = fuse(onnxfile.load(traced), MMDIT, linear(MMDIT[0].shape))
    vectors = 12 * DEPTH - 2
    context, conditioner = fused.stages
    assert (context.name, context.runs) == ("context", "condition")
    assert (conditioner.name, conditioner.runs) == ("conditioner", "time+condition")
    (pack,) = conditioner.packs
    assert pack.name == "conditioning" and pack.sizes == (1,) * vectors
    assert onnxfile.signature(conditioner.graph) == (
        (TensorSpec("timesteps", "float32", ("rows",)), TensorSpec("pooled", "float32", ("rows", 40))),
        (TensorSpec("conditioning", "float32", ("rows", vectors, WIDTH)),),
    )
    (text,) = context.packs
    assert text.name == "context" and set(text.sizes) == {TOKENS}
    assert fused.counts["hoist"] == vectors + len(text.tensors) and fused.counts["pack"] == vectors
    # The first block's text, modulated and projected to q, k and v, changes with the timestep: it stays in the loop.
    assert [priced.op for priced in fused.cut.priced_out] == ["Mul", "Add", *["MatMul", "Add"] * 3]
    reads, gives = onnxfile.signature(fused.denoiser)
    assert [spec.name for spec in reads] == ["latents", "context", "conditioning", "guidance"]
    assert gives == (TensorSpec("prediction", "float32", ("batch", *STATE.shape)),)


def test_the_fused_mmdit_is_guided_pytorch(mmdit: nn.Module, traced: Path, run: Run) -> None:
    fused = fuse(onnxfile.load(traced), MMDIT, linear(MMDIT[0].shape))
    assert fused.counts["fold_gains"] == 4 * DEPTH and fused.counts["guide"] == 1
    inputs, weights = random_inputs(MMDIT), np.array([1, 4, 2.5], np.float32)
    away = inputs | {name: random_inputs(MMDIT, seed=1)[name] for name in ("captions", "pooled")}
    groups = [run_stages(fused.stages, arrays, run) for arrays in (inputs, away)]
    names = [pack.name for stage in fused.stages for pack in stage.packs]
    arrays = {name: np.stack([group[name] for group in groups]) for name in names}
    arrays |= {"latents": inputs["latents"], "guidance": weights}
    (out,) = run(fused.denoiser, feeds(fused.denoiser, arrays))

    with torch.no_grad():
        own, null = (
            mmdit(**{name: torch.from_numpy(value) for name, value in rows.items()}).numpy() for rows in (inputs, away)
        )
    expected = null + weights[:, None, None, None] * (own - null)
    assert np.abs(out - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert np.abs(out - own).max() > 100 * TOLERANCE * np.abs(own).max()  # guidance shows


def pooled(width: int) -> tuple[gs.Graph, tuple[Port, ...]]:
    """A vector of (time, pooled), whose pooled half is a linear of `width`², and a text that the loop reads."""
    graph = empty(x=["n", 4, 8], time=["n"], text=["n", 8], pooled=["n", width])
    x, time, text, vector = graph.inputs
    projected = layer(graph, "MatMul", [vector, np.ones((width, width), np.float32)], ["n", width])
    moment = layer(graph, "Unsqueeze", [time, np.array([1])], ["n", 1])
    both = layer(graph, "Tanh", [layer(graph, "Add", [projected, moment], ["n", width])], ["n", width])
    narrow = layer(graph, "MatMul", [both, np.ones((width, 8), np.float32)], ["n", 8])
    step = layer(graph, "Unsqueeze", [narrow, np.array([1])], ["n", 1, 8])
    scaled = layer(graph, "Mul", [x, step], ["n", 4, 8])
    still = layer(graph, "Unsqueeze", [layer(graph, "Exp", [text], ["n", 8]), np.array([1])], ["n", 1, 8])
    graph.outputs = [layer(graph, "Add", [scaled, still], ["n", 4, 8])]
    shapes = {"x": (4, 8), "time": (), "text": (8,), "pooled": (width,)}
    roles = {"x": "state", "time": "time"}
    return graph, tuple(Port(name, roles.get(name, "condition"), "float32", shape) for name, shape in shapes.items())


@pytest.mark.parametrize("worth", [True, False])
def test_a_condition_is_projected_once_where_that_is_worth_it(worth: bool, run: Run) -> None:
    width = 512 if worth else 480
    assert (4 * width * (width - 1) > SPLIT) == worth
    graph, ports = pooled(width)
    inputs = random_inputs(ports)
    (whole,) = run(graph, inputs)
    stages, denoiser, _ = split_stages(graph, ports)
    context, conditioner = stages
    names = [tensor.name for tensor in conditioner.graph.inputs]
    assert names == (["time", "context_1"] if worth else ["time", "pooled"])
    # What the conditioner reads travels apart from what the denoiser reads.
    assert [pack.name for pack in context.packs] == ["context", "context_1"][: 1 + worth]
    assert [tensor.name for tensor in denoiser.inputs] == ["x", "context", "conditioning"]
    (again,) = run(denoiser, feeds(denoiser, run_stages(stages, inputs, run)))
    np.testing.assert_array_equal(again, whole)


def test_a_port_that_the_loop_reads_keeps_its_name(run: Run) -> None:
    graph = empty(x=["n", 4, 8], time=["n", 1, 8], mask=["n", 4])
    x, time, mask = graph.inputs
    visible = layer(graph, "Greater", [mask, np.array(0.5, np.float32)], ["n", 4], np.bool_)
    wide = layer(graph, "Unsqueeze", [visible, np.array([2])], ["n", 4, 1], np.bool_)
    scaled = layer(graph, "Mul", [x, layer(graph, "Exp", [time], ["n", 1, 8])], ["n", 4, 8])
    graph.outputs = [layer(graph, "Where", [wide, scaled, x], ["n", 4, 8])]
    ports = (
        Port("x", "state", "float32", (4, 8)),
        Port("time", "time", "float32", (1, 8)),
        Port("mask", "condition", "float32", (4,)),
    )
    fused = fuse(graph, ports, linear(ports[0].shape))
    reads, _ = onnxfile.signature(fused.denoiser)
    assert {spec.name: spec.shape for spec in reads} == {
        "x": ("batch", 4, 8),
        "mask": ("groups", "batch", 4),
        "modulation": ("groups", "batch", 1, 8),
        "guidance": ("batch",),
    }
    (stage,) = fused.stages
    assert (stage.name, stage.runs) == ("modulation", "time")
    x, time, masks = np.ones((2, 4, 8)), np.ones((2, 1, 8)), np.array([[[1, 0, 1, 0]] * 2, [[1, 1, 0, 0]] * 2])
    (modulation,) = run(stage.graph, {"time": time.astype(np.float32)})
    inputs = {"x": x, "mask": masks, "modulation": np.stack([modulation] * 2), "guidance": np.array([1.0, 3.0])}
    (out,) = run(fused.denoiser, {name: value.astype(np.float32) for name, value in inputs.items()})
    own, null = (np.where(mask[:, :, None] > 0, np.e, 1.0) for mask in masks)
    expected = null + np.array([1, 3])[:, None, None] * (own - null) + 0 * x
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_a_network_without_conditions_has_no_guidance(run: Run) -> None:
    graph = empty(x=["n", 4, 8], time=["n", 1, 8])
    x, time = graph.inputs
    scaled = layer(graph, "Mul", [x, layer(graph, "Exp", [time], ["n", 1, 8])], ["n", 4, 8])
    graph.outputs = [layer(graph, "Concat", [scaled, x], ["n", 8, 8], axis=1)]
    ports = (Port("x", "state", "float32", (4, 8)), Port("time", "time", "float32", (1, 8)))
    fused = fuse(graph, ports)
    assert fused.counts["guide"] == 0
    reads, gives = onnxfile.signature(fused.denoiser)
    assert [spec.name for spec in reads] == ["x", "modulation"]
    assert gives == tuple(TensorSpec(name, "float32", ("batch", 4, 8)) for name in ("prediction", "variance"))
    x = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)
    vectors = np.full((1, 3, 1, 8), 2, np.float32)
    prediction, variance = run(fused.denoiser, {"x": x, "modulation": vectors})
    np.testing.assert_array_equal(prediction, 2 * x)
    np.testing.assert_array_equal(variance, x)


def test_other_ports_than_the_graphs_inputs_are_noticed() -> None:
    graph, ports = pooled(16)
    with pytest.raises(RuntimeError, match="expected the ports"):
        fuse(graph, ports[:-1])


def test_a_network_that_reads_its_state_alone_is_refused() -> None:
    graph = empty(x=["n", 4, 8], time=["n"], text=["n", 8])
    graph.outputs = [layer(graph, "MatMul", [graph.inputs[0], np.eye(8, dtype=np.float32)], ["n", 4, 8])]
    roles = {"x": "state", "time": "time", "text": "condition"}
    ports = [Port(tensor.name, roles[tensor.name], "float32", tuple(tensor.shape[1:])) for tensor in graph.inputs]
    with pytest.raises(UsageError, match="'x' depends on neither its time nor a condition"):
        fuse(graph, ports, linear(ports[0].shape))
