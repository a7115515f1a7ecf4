"""Every solver that the demo bundle offers draws what it is asked for: the demo's judge says so.

`pytest -s -m slow tests/demo/test_solvers.py tests/cpp/test_demo_solvers.py` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from dit_export.bundle.build import build
from dit_export.demo import run, score, store
from dit_export.recipe import Recipe
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.sampling.process import NOISE_SOLVERS

USUAL = [("dpm++", 25, 0), ("dpm++1", 50, 0), ("dpm++3", 25, 0), ("ddim", 50, 0), ("ddim", 50, 1), ("ddpm", 250, 0)]
# Order 3 is for networks without guidance, as UniPC's authors say: with it, 15 steps of DEIS drew 7 of 40 classes.
USUAL += [("unipc", 15, 0), ("deis", 25, 0)]
SLOWER = [("unipc1", 15, 0), ("unipc3", 30, 0), ("deis3", 50, 0), ("sde-dpm++1", 50, 0), ("sde-dpm++", 25, 0)]
COUNT, LEAST = 400, 0.97
FEW, LEAST_OF_FEW = 60, 0.90  # four standard deviations of 60 pictures below 0.985; clipped latents gave 0.03 to 0.40
FEWER_STEPS = {250: 50}  # time is short in the default tests


def build_demo(folder: Path, precision: str) -> Path:
    recipe = Recipe(checkpoint=str(store.MODEL), precision=precision, max_batch=run.BATCH, backend="onnxruntime")
    return build(Recipe(**vars(recipe) | {"output": str(folder / precision)}), Progress()).folder


def agreement(pictures: Iterable[np.ndarray], labels: Sequence[int]) -> float:
    named, _ = score.look(store.load_judge(), pictures)
    return float((named == np.asarray(labels)).mean())


def sample(pipe: Pipeline, labels: Sequence[int], solver: str, steps: int, eta: float) -> np.ndarray:
    return pipe.sample(labels, steps=steps, guidance=run.GUIDANCE, seed=1, solver=solver, eta=eta)


@pytest.mark.parametrize(("solver", "steps", "eta"), USUAL)
def test_every_solver_draws_the_asked_class(demo_fp32: Path, solver: str, steps: int, eta: float) -> None:
    labels = score.balanced_labels(FEW)
    with Pipeline.load(demo_fp32) as pipe:
        pictures = sample(pipe, labels, solver, FEWER_STEPS.get(steps, steps), eta)
    assert agreement([pictures], labels) >= LEAST_OF_FEW


def test_no_solver_is_left_out() -> None:
    assert {solver for solver, _, _ in USUAL + SLOWER} == set(NOISE_SOLVERS)


@pytest.mark.slow
@pytest.mark.parametrize("precision", run.PRECISIONS)
def test_every_solver_at_its_usual_steps(tmp_path: Path, precision: str) -> None:
    labels, shares = score.balanced_labels(COUNT), {}
    with Pipeline.load(build_demo(tmp_path, precision)) as pipe:
        for solver, steps, eta in USUAL + SLOWER:
            share = shares[solver, eta] = agreement([sample(pipe, labels, solver, steps, eta)], labels)
            print(f"Python {precision} {solver} {steps} steps, eta {eta}: agreement {share:.2%}")
    assert min(shares.values()) >= LEAST, shares
