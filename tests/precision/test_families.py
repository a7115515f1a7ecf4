"""int8 of layers as diffusers' transformers have them: which are found, what their divisors fold into, and the error.

`pytest -s -m "" tests/precision/test_families.py` prints the table of docs/precision.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dit_export.graph import onnxfile
from dit_export.passes import LOWERINGS
from dit_export.precision import smooth as smoothing
from dit_export.precision.calibrate import Calibration
from dit_export.precision.layers import coverage, find, kind
from dit_export.precision.makers import grouped
from dit_export.precision.measure import Plan
from dit_export.precision.qdq import quantize
from dit_export.precision.smooth import pack_divisors, smooth
from dit_runtime.verify import relative_error
from tests.precision import transformers
from tests.precision.conftest import Scratch, scratch

NOT_DIVIDED = {  # kinds of layers that read what nothing linear makes alone
    "FLUX.1": {"ff.net.2", "ff_context.net.2"},  # a GELU
    "Sana": {"attn2.to_q"},  # the residual stream
    "SD3.5": {"ff.net.2", "ff_context.net.2"},
    "Chroma": {"ff.net.2", "ff_context.net.2"},
    "PixArt": {"attn2.to_q", "ff.net.2"},
    "LTX-Video": {"attn2.to_q", "ff.net.2"},
    # At this size the values of the first block's text are made before the loop, and others join them in it.
    "Qwen-Image": {"img_mlp.net.2", "txt_mlp.net.2", "attn.to_out.0"},
    "CogView4": {"ff.net.2", "ff.net.2-2"},  # both streams read the weights
    "Hunyuan-DiT": {"ff.net.2"},
}
JOINED = {"FLUX.1", "Chroma"}  # an attention and a GELU, along the channels that proj_out reads
FAST = {"FLUX.1", "Sana", "Lumina 2"}  # what the others have is in these, or in test_makers.py
QKV, ADDED = {"attn.to_q", "attn.to_k", "attn.to_v"}, {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"}
OUT = {"attn.to_out.0", "attn.to_add_out"}
SHARED = {  # kinds of layers that have divisors in common
    "FLUX.1": [QKV, ADDED, OUT, {"proj_mlp", *QKV}],
    "FLUX.2": [QKV, ADDED, OUT],
    "AuraFlow": [QKV, ADDED, OUT, {"ff.linear_1", "ff.linear_2"}],
    "Sana": [{"attn1.to_q", "attn1.to_k", "attn1.to_v"}],
    "Lumina 2": [QKV, {"feed_forward.linear_1", "feed_forward.linear_3"}],
    "SD3.5": [QKV, ADDED, OUT],
    "Chroma": [QKV, ADDED, OUT],
    "Qwen-Image": [QKV, ADDED, OUT],
    "Z-Image": [{"attention.to_q", "attention.to_k", "attention.to_v"}, {"feed_forward.w1", "feed_forward.w3"}],
}
ATTN1 = [{f"attn1.to_{part}" for part in "qkv"}]


class Family(NamedTuple):
    name: str
    bundle: Scratch
    calibration: Calibration


def marked(name: str) -> object:
    return name if name in FAST else pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=map(marked, transformers.CASES))
def family(request, tmp_path_factory, one_thread) -> Family:
    with one_thread():
        bundle = scratch(tmp_path_factory.mktemp("family") / "bundle", transformers.network(request.param), "velocity")
        return Family(request.param, bundle, bundle.calibrate(Plan(pictures=8, steps=4)))


def predictions(bundle: Scratch, graphs: dict, folder: Path, backend: str = "onnxruntime") -> np.ndarray:
    """Return conditional and null rows over the schedule, before guidance, in the form that a backend opens."""
    form = graphs | {"denoiser": graphs["denoiser"].copy()}
    for rewrite in LOWERINGS[backend]:
        rewrite(form["denoiser"])
    with bundle.open(form, folder, backend) as pipe:
        times = np.array([0.99, 0.7, 0.4, 0.1], np.float32)
        noise = np.random.default_rng(7).normal(size=(4, 2, *bundle.network.state.shape)).astype(np.float32)
        inputs = pipe.engines.inputs(times, bundle.rows(), None, np.ones(2, np.float32))
        return np.concatenate([pipe.engines.denoise(state, inputs, step)[0] for step, state in enumerate(noise)])


def test_layers_and_their_divisors(family: Family) -> None:
    denoiser = family.bundle.graphs()["denoiser"]
    layers = find(denoiser)
    parameters = {name.removeprefix("transformer.") for name, _ in family.bundle.network.module.named_parameters()}
    assert all(f"{layer.name.partition('-')[0]}.weight" in parameters for layer in layers)
    assert coverage(denoiser, layers) >= 0.95
    groups = grouped(layers)
    shared = [{kind(layer.name) for layer in group.layers} for group in groups]
    assert all(names in shared for names in SHARED.get(family.name, ATTN1))
    blocks = {len(group.layers) for group in groups if {kind(layer.name) for layer in group.layers} == QKV}
    assert blocks == ({6} if family.name == "FLUX.2" else {3} if QKV in shared else set())  # its 2 blocks share vectors
    bare = [group for group in groups if not group.places]
    assert {kind(group.layers[0].name) for group in bare} == NOT_DIVIDED.get(family.name, set())
    partly = [group for group in groups if 0 < len(group.channels) < len(group.layers[0].matrix)]
    assert [kind(group.layers[0].name) for group in partly] == ["proj_out"] * (family.name in JOINED)
    assert sum(len(group.channels) for group in partly) in (0, 64)  # attention's channels, beside those of a GELU


def test_the_fold_changes_no_answer(family: Family, tmp_path: Path) -> None:
    bundle = family.bundle
    expected = predictions(bundle, bundle.graphs(), tmp_path)
    graphs = bundle.graphs()
    *before, denoiser = graphs.values()
    census, names = onnxfile.census(denoiser), [layer.name for layer in find(denoiser)]
    chosen = smooth(before, denoiser, family.calibration)
    assert onnxfile.census(denoiser) == census and [layer.name for layer in find(denoiser)] == names
    assert relative_error(predictions(bundle, graphs, tmp_path), expected) <= 1e-5
    assert pack_divisors(denoiser, chosen).keys() <= {tensor.name for graph in before for tensor in graph.outputs}
    # Teeth: the folded denoiser with the old stages is another function.
    assert relative_error(predictions(bundle, bundle.graphs() | {"denoiser": denoiser}, tmp_path), expected) > 1e-2


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_the_error_of_int8(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    bundle = family.bundle
    expected, errors = predictions(bundle, bundle.graphs(), tmp_path), []
    for alphas in (smoothing.ALPHAS, smoothing.ALPHAS[:1]):
        monkeypatch.setattr(smoothing, "ALPHAS", alphas)
        graphs = bundle.graphs()
        *before, denoiser = graphs.values()
        share, layers = coverage(denoiser, find(denoiser)), len(find(denoiser))
        assert share >= 0.95 and quantize(denoiser, smooth(before, denoiser, family.calibration)) == layers
        errors.append(relative_error(predictions(bundle, graphs, tmp_path, backend), expected))
        form = denoiser.copy()
        counts = [rewrite(form) for rewrite in LOWERINGS[backend]]
        if backend == "onnxruntime":
            assert counts[-1] == layers and "DequantizeLinear" not in onnxfile.census(form)
    smoothed, plain = errors
    print(f"| {family.name} | {backend} | {layers} | {100 * share:.1f} % | {plain:.4f} | {smoothed:.4f} |")
    assert 1e-4 < smoothed <= 0.05 and smoothed <= 0.7 * plain
