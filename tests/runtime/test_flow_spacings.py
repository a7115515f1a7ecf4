"""Curves between the ends of a flow's σ, and lists of σ."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from dit_runtime.errors import UsageError
from dit_runtime.sampling.process import CURVES, Process, Sampler
from dit_runtime.sampling.schedule import sigmas
from dit_runtime.sampling.solvers import plan
from tests.runtime.test_flow import FLOW, SHIFTED, both

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # its np.array(tensor)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("config", [{"shift": 3.0}, {"use_dynamic_shifting": True, "shift_terminal": 0.1}])
def test_curves_are_diffusers(config, curve):
    """Chroma's scheduler has use_beta_sigmas: a curve between the ends of its pipeline's σ, after the shift."""
    for steps, spacing in product((2, 10, 28), ("trailing", "linspace")):
        process, scheduler = both(config | {f"use_{curve}_sigmas": True}, steps, spacing)
        ours, theirs = sigmas(process, "euler", steps), scheduler.sigmas.numpy()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)  # float32 of both; 2.4e-7 was measured
        np.testing.assert_array_equal(plan(process, "euler", steps), ours[:-1])
        straight = sigmas(process, "euler", steps, spacing)
        assert (np.abs(ours - straight).max() > 0.03) == (steps > 2)
        np.testing.assert_array_equal(ours, sigmas(both(config, steps, spacing)[0], "euler", steps, curve))


def test_a_network_that_reads_other_times_takes_no_curve_and_no_list():
    integer = Process(prediction="velocity", shift=3.0, sampler=Sampler(solver="euler", flow_spacing="integer"))
    for spacing in ("beta", "0.9, 0.5"):
        with pytest.raises(UsageError, match="this network reads σ before its shift, so take 'integer'"):
            plan(integer, "euler", 2, spacing)
        assert len(plan(FLOW, "euler", 2, spacing)) == 2


def test_listed_times_are_the_runs():
    """They are σ as the network reads it: not shifted, and rounded to float32."""
    for solver in ("euler", "dpm++", "unipc"):
        asked = sigmas(SHIFTED, solver, 3, "0.999, 0.61, 0.3")
        np.testing.assert_array_equal(asked, np.float32([0.999, 0.61, 0.3, 0]))
        np.testing.assert_array_equal(plan(SHIFTED, solver, 3, "0.999, 0.61, 0.3"), asked[:-1])
    discrete = Process(prediction="velocity", sampler=Sampler(solver="dpm++", flow_spacing="discrete"))
    np.testing.assert_array_equal(plan(discrete, "dpm++", 2, "0.9995, 0.5004"), np.float32([0.999, 0.5]))


@pytest.mark.parametrize(
    ("solver", "spacing", "message"),
    [
        ("euler", "1.5, 0.5", "expected σ of a flow, from 1 down to above 0"),
        ("euler", "1, 0", "expected σ of a flow, from 1 down to above 0"),
        ("euler", "0.5, 0.9", "expected a name, or falling times"),
        ("euler", "1, 0.9, 0.5", "steps is 2; expected 3, for spacing lists so many times"),
        ("euler", "0.5, 0.49999999999", "two σ are the same in float32"),
        ("unipc", "1, 0.9999999", "two σ are the same in float32"),
        ("sde", "1, 0.5", "with solver sde; its steps are even"),
    ],
)
def test_lists_that_are_no_path_are_refused(solver, spacing, message):
    with pytest.raises(UsageError, match=message):
        plan(FLOW, solver, 2, spacing)
