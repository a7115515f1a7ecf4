"""Traced families: ONNX Runtime is PyTorch, the stages are the whole to the bit, and TensorRT-RTX compiles the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch

from dit_export.graph import onnxfile, trace
from dit_export.networks import Network
from dit_export.networks.families import family_network
from dit_export.passes import fuse, require
from dit_export.passes.attention import plain_attention
from dit_export.passes.stages import split_stages
from dit_runtime.backends import Options, backend
from dit_runtime.progress import Progress
from tests.networks import tiny
from tests.rules import traced_rule
from tests.tensorrt.graphs import save

pytestmark = pytest.mark.slow
NETWORKS: dict[str, Callable[[], Network]] = {
    "pixart": lambda: family_network(tiny.pixart(use_additional_conditions=False), (8, 12), tiny.TOKENS),
    "sd3.5": lambda: family_network(tiny.sd3(**tiny.SD3_5), (8, 12), tiny.TOKENS),
    "flux": lambda: family_network(tiny.flux(num_single_layers=2), (8, 12), tiny.TOKENS),
    "auraflow": lambda: family_network(tiny.auraflow(), (8, 12), tiny.TOKENS),
    "cogview4": lambda: family_network(tiny.cogview4(), (8, 12), 64),
    "flux2 klein": lambda: family_network(tiny.flux2(), (8, 12), tiny.TOKENS),
    "flux2 dev": lambda: family_network(tiny.flux2(guidance_embeds=True), (8, 12), tiny.TOKENS),
    "hunyuandit": lambda: family_network(tiny.hunyuan_dit(), (8, 12), 32),
    "ltx": lambda: family_network(tiny.ltx(), (2, 4, 6), tiny.TOKENS),
    "qwen-image": lambda: family_network(tiny.qwen_image(), (8, 12), 96),
    "lumina2": lambda: family_network(tiny.lumina2(), (8, 12), 96),
    "z-image": lambda: family_network(tiny.z_image(), (8, 12), 128),
    "chroma": lambda: family_network(tiny.chroma(num_single_layers=2), (8, 12), tiny.TOKENS),
    "sana": lambda: family_network(tiny.sana(), (6, 4), tiny.TOKENS),
}
TOLERANCE = 1e-5  # fp32 sums in another order; measured 7e-7
Rows = dict[str, np.ndarray]


@pytest.fixture(scope="module", params=NETWORKS)
def traced(request, tmp_path_factory, one_thread) -> tuple[Network, Path]:
    network, folder = NETWORKS[request.param](), tmp_path_factory.mktemp(request.param)
    with one_thread():
        trace.trace_network(network).save(folder / "network.onnx", external_data=True)
    return network, folder / "network.onnx"


@pytest.fixture
def run(tmp_path) -> Callable[[gs.Graph, Rows], Rows]:
    def run_graph(graph: gs.Graph, values: Rows) -> Rows:
        graph = graph.copy()
        plain_attention(graph)  # as every graph for ONNX Runtime is lowered
        onnxfile.save(graph, tmp_path / "graph.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        read = {spec.name: values[spec.name] for spec in session.get_inputs()}
        return dict(zip(names, session.run(None, read), strict=True))

    return run_graph


def values(network: Network, rows: int, seed: int = 0) -> Rows:
    return {name: rows.numpy() for name, rows in tiny.inputs(network, rows, seed=seed).items()}


def test_onnxruntime_is_pytorch(traced, run) -> None:
    network, path = traced
    for rows in (1, 2, 3):
        inputs = values(network, rows, seed=rows)
        got = run(onnxfile.load(path), inputs)["prediction"]
        expected, other = (
            tiny.run(network, {name: torch.from_numpy(part) for name, part in some.items()}).numpy()
            for some in (inputs, inputs | {"timesteps": inputs["timesteps"] + 0.1})
        )
        assert np.linalg.norm(got - expected) <= TOLERANCE * np.linalg.norm(expected)
        assert np.linalg.norm(got - other) > 100 * TOLERANCE * np.linalg.norm(expected)


def test_stages_are_the_whole(traced, run) -> None:
    network, path = traced
    made = values(network, 3)
    whole = run(onnxfile.load(path), made)["prediction"]
    stages, denoiser, _ = split_stages(onnxfile.load(path), network.ports)
    for stage in stages:
        made |= run(stage.graph, made)
    assert np.array_equal(run(denoiser, made)["prediction"], whole)
    for name in [tensor.name for tensor in denoiser.inputs]:  # each is read
        broken = run(denoiser, made | {name: -made[name]})["prediction"]
        assert np.linalg.norm(broken - whole) > 1e-3 * np.linalg.norm(whole), name


def test_passes_fire_as_predicted(traced) -> None:
    network, path = traced
    fused = fuse(onnxfile.load(path), network.ports, traced_rule(network))
    counts = fused.counts | {"plain_attention": plain_attention(fused.denoiser)}
    assert {"share_rows", "guide", "plain_attention"} <= network.counts.keys()
    require(counts, network.counts, fused.misses)


def test_tensorrt_compiles_the_loop(traced, tmp_path) -> None:
    network, path = traced
    rtx = backend("tensorrt-rtx")
    if rtx.version() is None:
        pytest.skip("tensorrt-rtx is not installed")
    fused = fuse(onnxfile.load(path), network.ports, traced_rule(network))
    stage = save(fused.denoiser, tmp_path, "fp32")
    files, built = rtx.compile(tmp_path, stage, Options(precision="fp32"), Progress())
    assert (tmp_path / files[0]).stat().st_size > onnxfile.weight_bytes(fused.denoiser)
    assert built["version"] == rtx.version()
