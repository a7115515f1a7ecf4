"""How long PyTorch's run in reference.npz is."""

from __future__ import annotations

import pytest

from dit_export.verify.reference import step_count
from dit_runtime.sampling.process import Process, Sampler


@pytest.mark.parametrize(("latent_size", "steps"), [(32, 10), (64, 8), (96, 4), (128, 4)])
def test_a_run_is_long_enough_to_be_one(latent_size, steps):
    shape = (4, latent_size, latent_size)
    assert step_count(shape, Process()) == steps
    velocity = Process(prediction="velocity", sampler=Sampler(solver="heun"))
    assert step_count(shape, velocity) == steps // 2  # each of two evaluations
