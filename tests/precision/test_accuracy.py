"""How near int8 is to fp32 at every step of a real run, with smoothing and without, before guidance and after."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from dit_runtime.replay import relative_error

from dit_export.graph import onnxfile
from dit_export.networks.spec import model
from dit_export.precision import attention
from dit_export.precision.calibrate import Calibration, Plan, calibrate
from dit_export.precision.qdq import quantize
from dit_export.precision.smooth import smooth
from dit_runtime import backends
from dit_runtime.backends import Options
from dit_runtime.bundle import manifest
from dit_runtime.pipeline import Pipeline
from dit_runtime.sampling.solvers import plan
from tests.precision.conftest import unverified_bundle

STEPS, GUIDANCE, LABEL = 10, 4.0, 7


class Errors(NamedTuple):
    """Relative L2 of each step, asked what fp32 was asked."""

    conditional: list[float]
    null: list[float]
    guided: list[float]


class Question(NamedTuple):
    latents: np.ndarray  # (1, C, H, W)
    time: float


def run(pipe: Pipeline) -> list[Question]:
    """What the network is asked at each step of a guided run."""
    shape = (1, *pipe.manifest.latent_shape)
    seen = [np.random.default_rng(11).normal(size=shape).astype(np.float32)]
    times = plan(pipe.manifest.diffusion, pipe.manifest.diffusion.sampler.solver, STEPS)
    pipe.sample(
        [LABEL],
        steps=STEPS,
        guidance=GUIDANCE,
        latents=seen[0],
        output="latents",
        on_step=lambda done, steps, x: seen.append(x.astype(np.float32)),
    )
    return [Question(x, float(t)) for x, t in zip(seen[:-1], times, strict=True)]


def answers(pipe: Pipeline, asked: Sequence[Question]) -> list[tuple[np.ndarray, ...]]:
    """Of each question: the conditional and the null row, and both mixed."""
    ids, found = np.array([LABEL, pipe.manifest.null_label]), []
    for latents, time in asked:
        rows = pipe.condition(np.full(2, time, np.float32), ids)
        both = pipe.denoise(latents.repeat(2, axis=0), rows[None], np.ones(2, np.float32))[0]
        guided = pipe.denoise(latents, rows[:, None], np.full(1, GUIDANCE, np.float32))[0]
        found.append((both[:1], both[1:], guided))
    return found


def errors(bundle: Path, calibration: Calibration, folder: Path, backend: str, smoothing: bool) -> Errors:
    conditioner, denoiser = (onnxfile.load(bundle / f"{name}.onnx") for name in ("conditioner", "denoiser"))
    chosen = smooth(conditioner, denoiser, calibration, smoothing)
    grids = attention.steps(denoiser, calibration, ())
    quantize(denoiser, chosen)
    for rewrite in attention.passes(backend, grids):
        rewrite(denoiser)
    with ExitStack() as stack:
        exact = stack.enter_context(Pipeline.load(bundle))
        engines = {}
        for name, graph, precision in (("conditioner", conditioner, "fp32"), ("denoiser", denoiser, "int8")):
            files = onnxfile.save(graph, folder / f"{name}.onnx")
            module = backends.backend("onnxruntime" if name == "conditioner" else backend)
            engines[name] = module.open([folder / file for file in files], Options(precision=precision))
        narrow = stack.enter_context(Pipeline(bundle, manifest.read(bundle), engines))
        asked = run(exact)
        pairs = zip(answers(narrow, asked), answers(exact, asked), strict=True)
        steps = [[relative_error(*each) for each in zip(*pair, strict=True)] for pair in pairs]
    return Errors(*(list(column) for column in zip(*steps, strict=True)))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_int8_of_a_small_network(bundle, calibration, tmp_path, backend) -> None:
    require(bundle, calibration, tmp_path, backend)


@pytest.mark.slow
def test_int8_of_xl_2(tmp_path, capsys) -> None:
    """20 minutes and 16 GB; `pytest -s -m slow tests/precision/test_accuracy.py` prints the figures."""
    bundle = unverified_bundle(tmp_path, model("XL/2"))
    calibration = calibrate(bundle, Plan(), lambda done, total: None)
    for backend in ("onnxruntime", "openvino"):
        require(bundle, calibration, tmp_path, backend)


def require(bundle: Path, calibration: Calibration, folder: Path, backend: str) -> None:
    """0.035 is twice the noise that 8 bits leave in a sound W8A8 network of 28 blocks; unsmoothed ones have 0.045."""
    (folder / backend).mkdir()
    plain, smoothed = (errors(bundle, calibration, folder / backend, backend, smoothing) for smoothing in (False, True))
    for name in Errors._fields:
        with_, without = getattr(smoothed, name), getattr(plain, name)
        print(f"{backend} {name}: {np.round(with_, 4)}, without smoothing {np.round(without, 4)}")
        if name != "guided":
            assert max(with_) <= 0.035
            assert all(one <= 0.65 * other for one, other in zip(with_, without, strict=True))
