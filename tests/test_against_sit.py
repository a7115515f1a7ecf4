"""A checkpoint that predicts a velocity, as SiT's code writes it, against a reference written here from its facts."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from dit_export.bundle.build import build
from dit_export.checkpoints import load
from dit_export.cli import main
from dit_export.recipe import Recipe
from dit_runtime import Pipeline, verify
from dit_runtime.bundle import manifest
from dit_runtime.cli import main as run
from dit_runtime.progress import Progress
from tests.test_against_meta import CHANNELS, CLASSES, LABELS, LATENT, PATCH, distance, prediction

SIT = ("euler", "heun", "sde")  # the solvers of its code

STEPS = 10
# Two fp32 programs, each summing in its own order: measured 9e-8 to 3e-7, the rest is room for other CPUs' kernels. The
# least wrong detail below, a last step of 0.041, is worth 3.7e-4.
LATENTS_RTOL = 1e-5


class Detail:
    """Details that are easy to get wrong: the direction of time, the coefficient of the SDE, its last step, the
    channels."""

    reversed = False
    coefficient = 1.0
    last_step = 0.04
    guided = 3


@torch.no_grad()
def sample(w: dict, solver: str, labels: list[int], guidance: float, detail: type = Detail) -> np.ndarray:
    """SiT: t runs from 0 (noise) to 1 (data) and reaches the network as it is; the network gives dx/dt."""
    random = torch.Generator("cpu").manual_seed(42)
    x = torch.randn((len(labels), CHANNELS, LATENT, LATENT), generator=random)
    y, null = torch.tensor(labels), torch.full((len(labels),), CLASSES)

    def velocity(x, t):
        t = 1 - t if detail.reversed else t
        own, other = prediction(w, x, t, y), prediction(w, x, t, null)
        guided = other + guidance * (own - other)
        return torch.cat([guided[:, : detail.guided], own[:, detail.guided :]], dim=1)

    def drift(x, t):
        """Velocity and score: that of x = t data + (1 - t) noise is -noise / (1 - t)."""
        v = velocity(x, t)
        return v + detail.coefficient * (1 - t) * (t * v - x) / (1 - t)

    if solver == "sde":
        times = torch.linspace(0, 1 - detail.last_step, STEPS, dtype=torch.float64)
        dt = float(times[1])
        for t in map(float, times[:-1]):
            x = x + dt * drift(x, t)
            x = x + math.sqrt(2 * detail.coefficient * (1 - t) * dt) * torch.randn(x.shape, generator=random)
        return (x + detail.last_step * drift(x, 1 - detail.last_step)).numpy()
    for step in range(STEPS):
        t, after = step / STEPS, (step + 1) / STEPS
        v = velocity(x, t)
        if solver == "heun":
            v = (v + velocity(x + v / STEPS, after)) / 2
        x = x + v / STEPS
    return x.numpy()


@pytest.fixture(scope="module")
def weights(velocity) -> dict[str, torch.Tensor]:
    return torch.load(velocity.checkpoint, weights_only=True)["ema"]


@pytest.fixture(scope="module")
def bundle(velocity, one_thread):
    with one_thread(), Pipeline.load(velocity.bundle, threads=1) as pipe:
        yield pipe


@pytest.mark.parametrize("solver", SIT)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_latents(bundle, weights, solver, guidance):
    expected = sample(weights, solver, LABELS, guidance)
    got = bundle.sample(LABELS, steps=STEPS, guidance=guidance, seed=42, solver=solver, output="latents")
    assert got.shape == expected.shape and 0.1 < expected.std() < 10  # neither died nor exploded
    assert distance(got, expected) < LATENTS_RTOL


@pytest.mark.parametrize(
    ("solver", "wrong"),
    [
        *((solver, {"reversed": True}) for solver in SIT),
        *((solver, {"guided": CHANNELS}) for solver in SIT),
        ("sde", {"coefficient": 0.99}),
        ("sde", {"last_step": 0.041}),
    ],
)
def test_a_wrong_detail_would_be_seen(bundle, weights, solver, wrong):
    expected = sample(weights, solver, LABELS, 4.0, detail=type("Wrong", (Detail,), wrong))
    got = bundle.sample(LABELS, steps=STEPS, guidance=4.0, seed=42, solver=solver, output="latents")
    assert distance(got, expected) > 10 * LATENTS_RTOL


def test_the_channels_that_nothing_reads_are_gone(velocity):
    """The checkpoint has twice the channels, as DiT's; the network that ships gives the velocity alone."""
    contract = manifest.read(velocity.bundle)
    assert contract.process.prediction == "velocity" and contract.process.sampler.solver == "euler"
    assert [spec.name for spec in contract.step.gives] == ["prediction"]
    graph = onnx.load(velocity.bundle / "denoiser.onnx", load_external_data=False).graph
    widths = {max(weight.dims) for weight in graph.initializer if PATCH**2 * CHANNELS in weight.dims}
    assert widths and not [weight for weight in graph.initializer if 2 * PATCH**2 * CHANNELS in weight.dims]
    checks = json.loads((velocity.bundle / "parity.json").read_text())
    assert checks["proof"] == "sensitive"  # of t, which the network sees between 0 and 1


@pytest.mark.parametrize("solver", SIT)
def test_the_reference_of_every_default_solver(velocity, tmp_path, one_thread, solver):
    """Heun's method asks twice a step, the SDE draws noise: the replay does as PyTorch did."""
    recipe = manifest.read(velocity.bundle).source["recipe"] | {"output": str(tmp_path / "bundle")}
    loaded = load(Recipe(**recipe))
    process = replace(loaded.process, sampler=replace(loaded.process.sampler, solver=solver))
    with one_thread():
        build(Recipe(**recipe), Progress(), loaded=replace(loaded, process=process))
        with Pipeline.load(tmp_path / "bundle", threads=1) as pipe:
            figures = verify.verify(pipe)
        assert all(figure.passed for figure in figures), verify.table(figures)
        assert sum(figure.name == "run: latents, rel-L2" for figure in figures) == 10
        other = next(name for name in SIT if name != solver)
        process = replace(process, sampler=replace(process.sampler, solver=other))
        manifest.write(tmp_path / "bundle", replace(manifest.read(tmp_path / "bundle"), process=process))
        with Pipeline.load(tmp_path / "bundle", threads=1) as pipe:
            assert not all(figure.passed for figure in verify.verify(pipe))


def test_the_gate_passes_and_a_wrong_solver_is_refused(velocity, tmp_path, capsys):
    """`regress` as for any bundle; and one line where the solver does not fit."""
    assert main(["regress", str(velocity.bundle), "--threads", "1"]) == 0
    capsys.readouterr()
    arguments = ["--labels", "1", "--solver", "ddim", "-o", str(tmp_path / "x.npy")]
    assert run(["sample", str(velocity.bundle), *arguments]) == 2
    said = capsys.readouterr().err
    assert "solver 'ddim' does not fit a model that predicts velocity; take one of dpm++1, dpm++, dpm++3, euler" in said
    assert not list(tmp_path.iterdir())


def test_int8(velocity, tmp_path, capsys, one_thread):
    """Calibrated along its own sampler's run."""
    with one_thread():
        options = ["--heads", "4", "--latents-only", "--prediction", "velocity", "--precision", "int8"]
        command = ["build", "--checkpoint", str(velocity.checkpoint), *options, "-o", str(tmp_path / "bundle")]
        assert main([*command, "--max-batch", "2"]) == 0
    capsys.readouterr()
    contract = manifest.read(tmp_path / "bundle")
    assert contract.process.prediction == "velocity" and contract.step.precision == "int8"


def test_a_size_of_the_table(tmp_path, capsys, one_thread):
    """Made-up weights: built, verified, sampled, and they hear t."""
    folder = tmp_path / "bundle"
    options = ["--synthetic", "--prediction", "velocity", "--resolution", "128", "--latents-only", "-o", str(folder)]
    with one_thread():
        assert main(["build", "S/8", *options, "--max-batch", "2"]) == 0
        assert run(["verify", str(folder), "--threads", "1"]) == 0
    capsys.readouterr()
    contract = manifest.read(folder)
    assert contract.parity["proof"] == "sensitive" and contract.built_with["passes"]["denoiser"]["hoist"] == 6 * 12 + 2
    with Pipeline.load(folder, threads=1) as pipe:
        for solver in SIT:
            latents = pipe.sample([207, 360], steps=4, solver=solver, output="latents")
            assert latents.shape == (2, 4, 16, 16) and 0.1 < latents.std() < 10
            assert np.abs(latents[0] - latents[1]).mean() > 0.1
