"""How long PyTorch's run in reference.npz is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dit_export.networks.spec import model
from dit_export.verify.reference import step_count
from dit_runtime.sampling.process import Process, Sampler


@pytest.mark.parametrize(("latent_size", "steps"), [(32, 10), (64, 8), (96, 4), (128, 4)])
def test_a_run_is_long_enough_to_be_one(latent_size, steps):
    spec = replace(model("S/2"), latent_size=latent_size)
    assert step_count(spec, Process()) == steps
    velocity = Process(prediction="velocity", sampler=Sampler(solver="heun"))
    assert step_count(spec, velocity) == steps // 2  # each of two evaluations
