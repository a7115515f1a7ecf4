"""Every solver that the demo bundle offers, in C++, before the demo's judge."""

from __future__ import annotations

import numpy as np
import pytest

from dit_export.demo import run, score
from tests.demo.test_solvers import COUNT, LEAST, SLOWER, USUAL, agreement, build_demo


@pytest.mark.slow
@pytest.mark.parametrize("precision", run.PRECISIONS)
def test_every_solver_at_its_usual_steps(dit_generate, tmp_path, precision: str) -> None:
    bundle, labels, shares = build_demo(tmp_path, precision), score.balanced_labels(COUNT), {}
    for solver, steps, eta in USUAL + SLOWER:
        pictures = []
        for seed, part in enumerate(np.split(np.array(labels), COUNT // 20)):
            options = ["--labels", *part, "--steps", steps, "--solver", solver, "--eta", eta, "--seed", seed]
            done = dit_generate(bundle, *options, "--guidance", run.GUIDANCE, "-o", tmp_path / "x.npz")
            assert done.returncode == 0, done.stderr
            with np.load(tmp_path / "x.npz") as made:
                pictures.append(made["arr_0"])
        share = shares[solver, eta] = agreement(pictures, labels)
        print(f"C++ {precision} {solver} {steps} steps, eta {eta}: agreement {share:.2%}")
    assert min(shares.values()) >= LEAST, shares
