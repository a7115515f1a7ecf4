"""Every way of conditioning, through the whole toolchain: checkpoint, graphs, bundle, gates and a sampled picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_export.bench.floor import flops
from dit_export.checkpoints import load
from dit_export.cli import main
from dit_export.networks.spec import CONDITIONINGS, MODELS, conditioned
from dit_export.passes import expected_counts
from dit_export.recipe import Recipe
from dit_export.verify.parity import graph_parity
from dit_export.verify.reference import guide
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from dit_runtime.pipeline import Pipeline
from tests.conditionings import WAYS, save, spec_of

TOLERANCE = 1e-4  # of the largest value: fp32 sums in another order through up to 28 blocks; measured 3e-6


def build(*options: object) -> int:
    return main(["build", *map(str, options)])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, one_thread) -> dict:
    """conditioning -> PyTorch's network, build options, and the bundle in fp32."""
    found = {}
    for way in WAYS:
        folder = tmp_path_factory.mktemp(way)
        with one_thread():
            model, options = save(way, folder / "checkpoint")
            assert build(*options, "--backend", "onnxruntime", "--max-batch", 4, "-o", folder / "bundle") == 0
        found[way] = model, options, folder / "bundle"
    return found


def parity(pipe: Pipeline, model: torch.nn.Module, batch: int) -> tuple[float, float]:
    """Largest error of a guided evaluation over the largest value; the same for another label."""
    spec, generator = model.spec, torch.Generator().manual_seed(batch)
    x = torch.randn(batch, *spec.latent_shape, generator=generator)
    times = torch.linspace(20, 980, batch)
    labels = torch.arange(batch) % spec.num_classes
    null, weights = torch.full_like(labels, spec.null_label), np.linspace(1.5, 4, batch, dtype=np.float32)
    with torch.no_grad():
        out = model(x.repeat(2, 1, 1, 1), times.repeat(2), **model.told(torch.cat([labels, null]))).numpy()
    channels = spec.channels
    expected = guide(out[:batch, :channels], out[batch:, :channels], weights, spec.guided_channels)
    errors = []
    for ids in (labels, (labels + 1) % spec.num_classes):
        rows = np.stack([pipe.condition(times.numpy(), part.numpy()) for part in (ids, null)])
        context = pipe.examples(ids.tolist(), guided=True)(slice(None))
        prediction, _ = pipe.denoise(x.numpy(), rows, weights, context)
        errors.append(float(np.abs(prediction - expected).max() / np.abs(expected).max()))
    return errors[0], errors[1]


@pytest.mark.parametrize("way", WAYS)
def test_a_bundle_of_every_conditioning(bundles, way: str) -> None:
    model, _, folder = bundles[way]
    spec, contract = spec_of(way), manifest.read(folder)
    assert contract.parity["passed"] and contract.parity["proof"] == "sensitive"
    assert contract.model["conditioning"] == way
    counts = contract.built_with["passes"]["denoiser"]
    assert counts == {name: expected_counts(spec)[name] for name in counts}
    vectors = {"adaln-zero": 6 * 3 + 2, "adaln": 4 * 3 + 2, "in-context": 2, "cross-attention": 4 * 3}
    assert contract.graphs["conditioner"].outputs[0].shape == ("pairs", vectors.get(way, 6 * 3 + 2), 192)
    if spec.by.captioned:
        assert contract.graphs["context"].outputs[0].shape == ("captions", 2 * 3 * 120, 192)
        assert [tensor.name for tensor in contract.graphs["conditioner"].inputs] == ["timesteps"]
    with Pipeline.load(folder) as pipe:
        for batch in (1, 3):
            error, wrong = parity(pipe, model, batch)
            assert error <= TOLERANCE and wrong > 100 * TOLERANCE
        first, again, other = (pipe.sample([label], steps=4, output="latents") for label in (1, 1, 2))
        alone = pipe.sample([1], steps=4, guidance=1, output="latents")
    assert np.isfinite(first).all() and 0.1 < first.std() < 10
    assert np.array_equal(first, again) and np.abs(first - other).max() > 0.1 and np.abs(first - alone).max() > 0.1


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("way", WAYS[1:])  # the first has its own tests
def test_every_conditioning_in_int8(bundles, way: str, backend: str, tmp_path, one_thread, capsys) -> None:
    options = [*bundles[way][1], "--precision", "int8", "--backend", backend, "--max-batch", 4]
    folder = tmp_path / "bundle"
    with one_thread():
        assert build(*options, "-o", folder) == 0
    checks = json.loads((folder / "parity.json").read_text())["checks"]
    # Measured 0.007 to 0.027. The free run is the gate's: with captions it multiplies these by 15 to 25, by chance.
    assert max(check["value"] for check in checks if check["name"] in ("unguided, rel-L2", "null label, rel-L2")) < 0.03
    contract = manifest.read(folder)
    assert contract.graphs["denoiser"].precision == "int8"
    linears = 6 if CONDITIONINGS[way].crossed else 4
    assert contract.built_with["passes"]["denoiser"]["quantize"] == 3 * linears
    # What smoothing has divided is known exactly: PyTorch's own vectors, divided alike, are the conditioner's.
    assert max(check["value"] for check in checks if check["name"] == "conditioner, rel-L2") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "backend"), [("bf16", "openvino"), ("fp16", "onnxruntime")])
@pytest.mark.parametrize("way", WAYS[1:])
def test_every_conditioning_in_a_narrow_precision(bundles, way, precision, backend, tmp_path, one_thread) -> None:
    options = [*bundles[way][1], "--precision", precision, "--backend", backend, "--max-batch", 4]
    with one_thread():
        assert build(*options, "-o", tmp_path / "bundle") == 0
    assert manifest.read(tmp_path / "bundle").graphs["denoiser"].precision == precision


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["S/8", "B/4", "XL/2"])
def test_every_conditioning_in_the_papers_sizes(name: str, way: str, tmp_path: Path) -> None:
    recipe = Recipe(model=name, conditioning=way, synthetic=0)
    options = [name, "--synthetic", "--conditioning", way, "--max-batch", 2, "-o", tmp_path / "bundle"]
    assert build(*options) == 0
    loaded = load(replace(recipe, latents_only=True))
    with Pipeline.load(tmp_path / "bundle") as pipe:
        error, wrong = parity(pipe, loaded.model, 1)
        assert error <= TOLERANCE and wrong > 10 * TOLERANCE
        assert all(check.passed for check in graph_parity(pipe, loaded.model, None))
        picture = pipe.sample([1], steps=4)
    assert picture.shape == (1, 256, 256, 3) and picture.std() > 5


@pytest.mark.parametrize(
    ("name", "way", "gmac"),
    [  # of the paper's tables
        ("S/4", "adaln-zero", 1.41),
        ("B/4", "adaln-zero", 5.56),
        ("L/4", "adaln-zero", 19.70),
        ("XL/4", "adaln-zero", 29.05),
        ("XL/2", "adaln", 118.56),
        ("XL/2", "in-context", 119.37),
        ("XL/2", "cross-attention", 137.62),
    ],
)
def test_the_papers_cost(name: str, way: str, gmac: float) -> None:
    assert sum(flops(conditioned(MODELS[name], way))) / 2e9 == pytest.approx(gmac, rel=0.002)


def test_a_checkpoint_knows_its_conditioning(bundles, tmp_path, capsys) -> None:
    _, options, _ = bundles["adaln"]
    assert build(*options, "--conditioning", "adaln-zero", "-o", tmp_path / "x") == 2
    assert "the weights' conditioning is adaln, expected adaln-zero as the recipe says" in capsys.readouterr().err
    assert build("S/8", "--synthetic", "--conditioning", "adalm", "-o", tmp_path / "x") == 2
    assert 'did you mean "adaln"' in capsys.readouterr().err
    assert build("XL/2", "--conditioning", "in-context", "-o", tmp_path / "x") == 2
    assert "no public weights exist for XL/2 with in-context at 256 px" in capsys.readouterr().err


@pytest.mark.parametrize("way", WAYS)
def test_rectangles(bundles, way: str, tmp_path, one_thread) -> None:
    with one_thread():
        _, options, _ = bundles[way]
        command = [*options, "--backend", "onnxruntime", "--max-batch", 2, "--resolution", "64x96"]
        assert build(*command, "-o", tmp_path / "bundle") == 0
    with Pipeline.load(tmp_path / "bundle") as pipe:
        assert pipe.manifest.model["resolution"] == "64x96"
        assert pipe.sample([1], steps=2, output="latents").shape == (1, 4, 8, 12)


def test_sizes_that_no_network_has(bundles, tmp_path, capsys) -> None:
    _, options, _ = bundles["adaln-single"]
    for size, said in (("64x100", "multiple of 8"), ("72x64", "latents of side 9"), ("1x2x3", "height x width")):
        assert build(*options, "--resolution", size, "-o", tmp_path / "x") == 2
        assert said in capsys.readouterr().err


def test_captions_of_the_users_own(bundles) -> None:
    rng = np.random.default_rng(0)
    from dit_runtime.captions import examples

    from dit_runtime import Captions

    captions, empty = rng.normal(size=(2, 7, 32)).astype(np.float32), rng.normal(size=(1, 2, 32)).astype(np.float32)
    given = {"steps": 2, "output": "latents", "seed": [5, 6]}
    with Pipeline.load(bundles["adaln-single"][2]) as pipe:
        both = pipe.sample(captions=captions, negative=empty, **given)
        alone = pipe.sample(captions=captions[1:], negative=empty, **(given | {"seed": [6]}))
        np.testing.assert_allclose(both[1:], alone, rtol=0, atol=1e-4)  # a batch's GEMMs sum in another order
        # What the mask hides changes nothing; what it does not, does.
        mask = np.ones((2, 7))
        mask[:, 5:] = 0
        hidden, changed = Captions(captions, mask), captions.copy()
        changed[:, 5:] += 3
        expected = pipe.sample(captions=hidden, negative=empty, **given)
        np.testing.assert_array_equal(pipe.sample(captions=Captions(changed, mask), negative=empty, **given), expected)
        assert np.abs(expected - both).max() > 1e-2
        assert np.abs(pipe.sample(captions=captions, guidance=1, **given) - both).max() > 1e-2
        example, null = (examples([number], 120, 32) for number in (2, 4))
        np.testing.assert_array_equal(
            pipe.sample(captions=example, negative=null, steps=2, output="latents"),
            pipe.sample([2], steps=2, output="latents"),
        )
        for wrong, said in (
            ({"captions": captions}, "guidance needs negative="),
            ({"captions": captions[..., :5], "guidance": 1}, r"expected \(captions, up to 120, 32\)"),
            ({"captions": Captions(captions, mask[:, :3]), "guidance": 1}, "the mask has shape"),
            ({"captions": np.full_like(captions, np.nan), "guidance": 1}, "not finite"),
            (
                {"captions": captions, "negative": np.repeat(empty, 3, 0)},
                "3 negative captions; expected one, or one for each of 2",
            ),
            ({"captions": captions[:0], "guidance": 1}, r"captions have shape \(0, 7, 32\)"),
            ({"labels": [0], "negative": empty}, "negative captions without captions"),
            ({}, "no labels.*or captions"),
        ):
            with pytest.raises(UsageError, match=said):
                pipe.sample(**wrong, **given)
    with (
        Pipeline.load(bundles["adaln-zero"][2]) as pipe,
        pytest.raises(UsageError, match="this bundle takes labels, 0 to 9"),
    ):
        pipe.sample(captions=captions, **given)
