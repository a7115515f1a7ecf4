"""The demo's int8 before the judge, 5 × 2,000 pictures beside fp32's, and what smoothing and calibration are for.

`pytest -s -m slow tests/demo/test_int8.py` prints the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dit_export.bundle.assemble import Assembly
from dit_export.bundle.inputs import NO_INPUTS, Inputs
from dit_export.bundle.scratch import build_scratch_bundle
from dit_export.bundle.tracing import trace_graphs
from dit_export.checkpoints import load
from dit_export.demo import run, score, store
from dit_export.networks.codec import make_decoder
from dit_export.precision import smooth
from dit_export.precision.calibrate import Calibration
from dit_export.precision.measure import Plan
from dit_export.recipe import Recipe
from dit_runtime import images
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress

COUNT, SEEDS = 2_000, (1, 2, 3, 4, 5)  # so near to zero, the distance of 2,000 scatters by more than 3 %
SHORT = Plan(pictures=1, steps=2, batch=1)  # no trajectory: two timesteps of one class


class Quality(NamedTuple):
    """Means over the seeds."""

    agreement: float
    frechet: float
    psnr: float  # mean over the pictures of the same seeds


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_int8_keeps_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    base = Recipe(checkpoint=str(store.MODEL), backend=backend, max_batch=run.BATCH)
    loaded, traced, progress = load(base), tmp_path / "traced", Progress()
    decoder = make_decoder(loaded.vae)
    trace_graphs(traced, loaded, decoder, progress)
    judge, labels = store.load_judge(), score.balanced_labels(COUNT)
    real = score.reference_features(judge)

    def drawn(name: str, seeds: Sequence[int], recipe: Recipe, inputs: Inputs = NO_INPUTS) -> list[np.ndarray]:
        build_scratch_bundle(tmp_path / name, loaded, decoder, recipe, progress, traced, inputs)
        with Pipeline.load(tmp_path / name) as pipe:
            return [run.sample(pipe, labels, seed=seed) for seed in seeds]

    def quality(runs: list[np.ndarray]) -> Quality:
        rows = []
        for pictures, theirs in zip(runs, exact, strict=False):
            result = score.score(np.split(pictures, range(250, COUNT, 250)), labels, judge, real)
            ratios = [min(images.psnr(*pair), 100.0) for pair in zip(pictures, theirs, strict=True)]
            rows.append((result.accuracy.value, result.frechet.value, np.mean(ratios)))
        return Quality(*np.mean(rows, axis=0).tolist())

    def calibrate(name: str, plan: Plan) -> Calibration:
        (tmp_path / name).mkdir()
        quantized = replace(base, precision="int8")
        assembly = Assembly(tmp_path / name, traced, loaded, decoder, quantized, backend, progress, plan=plan)
        assembly.fuse()
        assembly.measure()
        assert assembly.measured.calibration is not None
        return assembly.measured.calibration

    exact = drawn("fp32", SEEDS, base)
    whole, short = calibrate("looked", Plan()), calibrate("glanced", SHORT)

    def int8(name: str, calibration: Calibration, seeds: Sequence[int] = SEEDS[:1]) -> Quality:
        return quality(drawn(name, seeds, replace(base, precision="int8"), Inputs(calibration)))

    table = {"fp32": quality(exact), "int8": int8("int8", whole, SEEDS)}
    table["calibrated at two timesteps, first seed"] = int8("short", short)
    monkeypatch.setattr(smooth, "ALPHAS", (0.0,))
    table["not smoothed, first seed"] = int8("plain", whole)
    for name, row in table.items():
        print(f"{backend} {name}: agreement {row.agreement:.2%}, Fréchet {row.frechet:.4f}, PSNR {row.psnr:.1f} dB")
    fp32, ours = table["fp32"], table["int8"]
    assert ours.agreement >= fp32.agreement - 0.005
    assert ours.frechet <= 1.03 * fp32.frechet
    assert ours.psnr > table["calibrated at two timesteps, first seed"].psnr
