"""The decoder's convolutions in int8: which they are, what they read, and that their pictures stay PyTorch's."""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from dit_export.bundle import assemble
from dit_export.bundle.assemble import Assembly
from dit_export.bundle.inputs import Inputs
from dit_export.checkpoints import Loaded
from dit_export.checkpoints.diffusers import read_process
from dit_export.checkpoints.synthetic import SD_VAE, synthetic_vae
from dit_export.graph import onnxfile, trace
from dit_export.networks.codec import Decoder, make_decoder
from dit_export.passes.subpixel import subpixel
from dit_export.precision import convolutions
from dit_export.precision.calibrate import Calibration
from dit_export.precision.convolutions import Choice
from dit_export.precision.measure import RecordingEngine, add_taps
from dit_export.recipe import Recipe
from dit_export.verify.parity import DECODER_PSNR
from dit_runtime import backends, images
from dit_runtime.backends import Options
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError
from dit_runtime.progress import Progress

CONFIG = SD_VAE | {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}
SIDE, OUTLIERS = 8, 2
BACKENDS = ("onnxruntime", "openvino")


class Fused(NamedTuple):
    decoder: Decoder
    graph: gs.Graph
    calibration: Calibration

    def decode(self, latents: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.decoder(torch.from_numpy(latents)).numpy()

    def choose(self) -> dict[str, Choice]:
        return convolutions.choose(convolutions.find(self.graph), self.calibration)

    def int8(self, backend: str, keep: Collection[str] = ()) -> gs.Graph:
        """Return a backend's form."""
        graph, chosen = self.graph.copy(), self.choose()
        passes = convolutions.passes(backend, convolutions.find(graph), chosen)
        convolutions.quantize(graph, chosen, keep)
        for rewrite in passes:
            rewrite(graph)
        return graph


@pytest.fixture(scope="module")
def fused(tmp_path_factory, one_thread) -> Fused:
    """Stable Diffusion's decoder with few channels, of which some stand out wherever a convolution reads."""
    folder = tmp_path_factory.mktemp("decoder")
    with one_thread():
        vae = synthetic_vae(0, CONFIG)
        add_outliers(vae)
        decoder = make_decoder(vae)
        program = trace.export_decoder(decoder, Port("latents", "state", "float32", (4, SIDE, SIDE)))
    program.save(folder / "decoder.onnx")
    graph = onnxfile.load(folder / "decoder.onnx")
    assert subpixel(graph) == 3
    onnxfile.name_rows(graph, "batch")
    return Fused(decoder, graph, calibrate(graph, folder))


@torch.no_grad()
def add_outliers(vae: torch.nn.Module) -> None:
    random = torch.Generator().manual_seed(1)
    for block in [vae.decoder.mid_block, *vae.decoder.up_blocks]:
        for resnet in block.resnets:
            for norm, conv in ((resnet.norm1, resnet.conv1), (resnet.norm2, resnet.conv2)):
                channels = torch.randperm(conv.in_channels, generator=random)[:OUTLIERS]
                s = torch.empty(OUTLIERS).uniform_(8, 20, generator=random)
                norm.weight[channels] *= s
                conv.weight[:, channels] /= s[:, None, None]
        if getattr(block, "upsamplers", None):
            (up,), last = block.upsamplers, block.resnets[-1]
            channels = torch.randperm(up.conv.in_channels, generator=random)[:OUTLIERS]
            last.conv2.weight[channels] *= 10
            up.conv.weight[:, channels] /= 10


def calibrate(graph: gs.Graph, folder: Path) -> Calibration:
    rng, tapped = np.random.default_rng(0), graph.copy()
    add_taps(tapped, layers=False, half=False, rng=rng, convolutions=True)
    recorder = RecordingEngine(tapped, folder / "tapped.onnx", 64, rng)
    for _ in range(3):
        recorder.run({"latents": rng.normal(size=(2, 4, SIDE, SIDE)).astype(np.float32)})
    recorder.close()
    return Calibration(recorder.statistics(), {})


def psnr(fused: Fused, form: gs.Graph, folder: Path, backend: str) -> float:
    latents = np.random.default_rng(5).normal(size=(2, 4, SIDE, SIDE)).astype(np.float32)
    files = [folder / name for name in onnxfile.save(form, folder / "form.onnx")]
    engine = backends.backend(backend).open(files, Options(threads=1, precision="int8"))
    pictures = engine.run({"latents": latents})["images"]
    engine.close()
    return images.psnr(pictures, fused.decode(latents), peak=1.0)


def test_the_layers(fused) -> None:
    """All that are larger than 1 × 1 but the first and the last, by what reads a tensor together."""
    layers = convolutions.find(fused.graph)
    expected = fused.decoder.expected_counts()
    names = [layer.name for layer in layers]
    assert len(layers) == expected["quantize_convolutions"] == len(set(names))
    assert sum(map(convolutions.kernels, names)) == sum(len(layer.nodes) for layer in layers)
    assert sum(map(convolutions.kernels, names)) == expected["quantize_outputs"]
    assert [name for name in names if " up " in name] == [f"decoder up {index}" for index in range(3)]
    chosen = {id(node) for layer in layers for node in layer.nodes}
    left = [node for node in fused.graph.nodes if node.op == "Conv" and id(node) not in chosen]
    shapes = [tuple(node.inputs[1].shape) for node in left]
    assert shapes == [(4, 4, 1, 1), (64, 4, 3, 3), (32, 64, 1, 1), (3, 32, 3, 3)]


@pytest.mark.parametrize(("frames", "group", "count"), [((), 1, 2), ((3,), 1, 0), ((), 4, 0)])
def test_convolutions_over_frames_and_of_single_channels_stay_float(frames, group, count) -> None:
    x = gs.Variable("latents", np.float32, ["n", 4, *(5 for _ in frames), 8, 8])
    graph = gs.Graph(inputs=[x])
    for index in range(4):
        kernel = gs.Constant(f"w{index}", np.zeros((4, 4 // group, *frames, 3, 3), np.float32))
        x, read = gs.Variable(f"y{index}", np.float32, x.shape), x
        graph.nodes.append(gs.Node("Conv", inputs=[read, kernel], outputs=[x], attrs={"group": group}))
    graph.outputs = [x]
    assert len(convolutions.find(graph)) == count


def test_entries_of_a_recipe(fused) -> None:
    layers = convolutions.find(fused.graph)
    assert convolutions.named(layers, ["decoder up", "decoder conv 3", "block 0"]) == [
        layer.name for layer in layers if " up " in layer.name or layer.name == "decoder conv 3"
    ]
    assert len(convolutions.named(layers, ["decoder"])) == len(layers)
    for entry in ("decoder conv 99", "decoder fc1"):
        with pytest.raises(UsageError, match="is not in this decoder"):
            convolutions.named(layers, [entry])


def test_calibration_on_disk(fused, tmp_path) -> None:
    fused.calibration.save(tmp_path / "c.npz")
    loaded = Calibration.load(tmp_path / "c.npz")
    for layer in convolutions.find(fused.graph):
        statistics = loaded.layers[layer.name]
        assert statistics.lowest is not None and -0.3 < statistics.lowest.min() < 0 if "conv" in layer.name else True
        assert np.abs(statistics.sample).max() <= statistics.largest.max() * 1.001
    assert convolutions.choose(convolutions.find(fused.graph), loaded).keys() == fused.choose().keys()
    without = Calibration({name: statistics for name, statistics in loaded.layers.items() if "conv 3" not in name}, {})
    with pytest.raises(UsageError, match="no decoder conv 3"):
        convolutions.choose(convolutions.find(fused.graph), without)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_stay(fused, tmp_path, monkeypatch, backend) -> None:
    """40 dB in spite of the outliers, and less where nothing is smoothed."""
    form = fused.int8(backend)
    census = onnxfile.census(form)
    if backend == "onnxruntime":
        assert census["QLinearConv"] == fused.decoder.expected_counts()["quantize_outputs"] and census["Conv"] == 4
    value = psnr(fused, form, tmp_path, backend)
    assert DECODER_PSNR["int8"] <= value < 70  # it is not fp32 under another name
    monkeypatch.setattr(convolutions, "ALPHAS", (0.0,))
    assert psnr(fused, fused.int8(backend), tmp_path, backend) < value - 1


def test_the_search_keeps_the_fewest(fused, tmp_path, monkeypatch) -> None:
    """Nothing where the limit holds; where two layers are spoilt, these two; and what the recipe keeps in any case."""
    monkeypatch.setattr(convolutions, "MEASURED", 4)
    limit = DECODER_PSNR["int8"] - 4  # of few channels, whose rounding does not average out; spoilt ones miss it by far

    tries: list[tuple[int, int]] = []

    def on_try(done: int, most: int) -> None:
        tries.append((done, most))

    def search(chosen: dict[str, Choice], fixed: Collection[str] = ()) -> convolutions.FloatConvolutions:
        return convolutions.fewest_in_float(
            fused.graph, chosen, fixed, "onnxruntime", tmp_path, fused.decode, limit, on_try
        )

    good = fused.choose()
    held = search(good, ["decoder conv 1"])
    assert held.kept == ["decoder conv 1"] and held.quantized == len(good) - 1 and held.psnr >= limit
    spoilt = ["decoder conv 2", "decoder up 2"]
    bad = good | {name: good[name]._replace(step=good[name].step / 20, error=1.0) for name in spoilt}
    held = search(bad)
    assert held.kept == spoilt and held.psnr >= limit
    assert not list(tmp_path.glob("decoder.tried*"))
    assert len(tries) > 4 and all(0 < done <= most for done, most in tries)
    tries.clear()
    assert search(bad, list(bad)) == (list(bad), 0, None) and not tries  # nothing is left to try


@pytest.fixture
def assembly(fused, bundle, tmp_path):
    """A bundle with the decoder that is fused and not measured yet."""

    def make(calibration: Calibration | None, backend: str, *keep: str) -> Assembly:
        network = bundle.network
        loaded = Loaded(network, None, (), read_process(None, network.learned_variance), {"kind": "synthetic"})
        recipe = Recipe(precision="int8", backend=backend, keep_float=[*keep])
        progress, inputs = Progress(io.StringIO()), Inputs(calibration)
        made = Assembly(tmp_path, tmp_path, loaded, fused.decoder, recipe, backend, progress, inputs=inputs)
        made.graphs |= {"denoiser": bundle.graphs()["denoiser"], "decoder": fused.graph.copy()}
        return made

    return make


def test_entries_are_refused_before_the_long_work(assembly, monkeypatch) -> None:
    monkeypatch.setattr(assemble, "measure", lambda *_, **__: pytest.fail("it was measured first"))
    with pytest.raises(UsageError, match="'decoder typo' is not in this decoder"):
        assembly(None, "onnxruntime", "decoder typo").measure()
    with pytest.raises(UsageError, match="'decoder conv 1': this build has no decoder in int8"):
        assembly(None, "tensorrt", "decoder conv 1").measure()


def test_a_calibration_of_a_build_without_this_decoder(assembly, fused) -> None:
    """It is good for the denoiser, and the decoder stays float."""
    made = assembly(Calibration({"block 0 fc1": fused.calibration.layers["decoder conv 1"]}, {}), "onnxruntime")
    made.measure()
    assert not made.quantizes_decoder
    assert "the decoder stays in float: the calibration is of a build without" in made.progress._stream.getvalue()
    made = assembly(fused.calibration, "onnxruntime")
    made.measure()
    assert made.quantizes_decoder and not made.progress._stream.getvalue()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bundle(narrow, backend) -> None:
    """Its calibration run reads the decoder too, and the manifest says what came of it."""
    bundle = narrow("int8", backend)
    contract = manifest.read(bundle)
    assert contract.end is not None and (contract.end.precision, contract.end.backend) == ("int8", backend)
    passes, outcome = contract.built_with["passes"]["decoder"], contract.built_with["convolutions"]
    assert passes["quantize_convolutions"] == outcome["quantized"] > 0
    assert outcome["psnr"] >= DECODER_PSNR["int8"]
    checks = json.loads((bundle / "parity.json").read_text())["checks"]
    (check, *_) = [check for check in checks if check["name"] == "decoder: pictures at a batch, PSNR in dB"]
    assert check["passed"] and check["limit"] == DECODER_PSNR["int8"] and check["value"] < 70
