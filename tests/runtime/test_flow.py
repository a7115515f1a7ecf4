"""The solvers of a velocity on Gaussian data, where the flow and every marginal are known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from dit_runtime.errors import UsageError
from dit_runtime.sampling.noise import Noise
from dit_runtime.sampling.schedule import FLOW_SOLVERS, NOISE_SOLVERS, Diffusion, Sampler
from dit_runtime.sampling.solvers import plan, solve

FLOW = Diffusion(prediction="velocity", sampler=Sampler(solver="euler"))
MEAN, SPREAD = 0.7, 0.5  # of the data


def spread(t):
    """Of x_t = t x₀ + (1 - t) ε."""
    return np.sqrt((t * SPREAD) ** 2 + (1 - t) ** 2)


def velocity(x, t):
    """E[x₀ - ε | x_t = x]: with it x_t - t MEAN stays in proportion to the spread, so x_1 = MEAN + SPREAD x_0."""
    return MEAN + (t * SPREAD**2 - (1 - t)) / spread(t) ** 2 * (x - t * MEAN)


def trajectory(solver, steps, x, draw=None, model=velocity):
    """Every (t, x there) of a run, the end with t = 1."""
    run = solve(FLOW, solver, steps, x, draw)
    state, t = next(run)
    states = []
    try:
        while True:
            states.append((t, state))
            state, t = run.send((model(state, t), None))
    except StopIteration as stop:
        return [*states, (1.0, stop.value)]


@pytest.mark.parametrize(
    ("solver", "low", "high"),
    [
        ("euler", 0.97, 1.03),  # measured 0.987 and 0.993
        ("heun", 1.93, 2.05),  # measured 1.950 and 1.976
    ],
)
def test_error_falls_with_the_solvers_order(solver, low, high):
    x = np.array([-1.5, 0.3, 2.0])
    errors = [np.abs(trajectory(solver, steps, x)[-1][1] - (MEAN + SPREAD * x)).max() for steps in (40, 80, 160)]
    for coarse, fine in pairwise(errors):
        assert low < np.log2(coarse / fine) < high


def off(scale):
    """The largest error of mean and spread of 20,000 paths of the SDE, in units of the data's spread."""
    random = np.random.default_rng(5)

    def draw(shape):
        return scale * random.standard_normal(shape, dtype=np.float32)

    states = trajectory("sde", 100, random.standard_normal(20_000), draw)[10:-1]
    return max(abs(error) for t, x in states for error in (x.mean() - t * MEAN, x.std() - spread(t))) / SPREAD


def test_the_sde_has_the_marginals_of_the_data_at_every_t():
    """Measured 0.025: the statistics of 20,000 numbers, and 100 steps of order 1."""
    assert off(1.0) < 0.04
    assert off(0.9) > 0.08 < off(1.1)  # 10 % less noise, or more: 0.092 and 0.094


def test_the_sde_ends_with_its_drift_alone():
    """From t = 0.96 one step of the drift, which halves none of the noise that is left: x₀ - (1 - t) ε of x_t."""
    data, noise = 0.4, -1.1
    end = trajectory(
        "sde", 25, np.zeros(3), lambda shape: np.zeros(shape, np.float32), lambda x, t: data - noise + 0 * x
    )
    (t, before), (_, after) = end[-2:]
    assert t == 0.96
    np.testing.assert_allclose(after, before + 0.04 * (1.96 * (data - noise) - before), rtol=1e-12)  # float64


@pytest.mark.parametrize(
    ("solver", "asked", "draws"),
    [
        ("euler", [0, 0.25, 0.5, 0.75], 0),
        ("heun", [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1], 0),
        ("sde", [0, 0.32, 0.64, 0.96], 3),  # as its authors': four points, and a last step of 0.04 without noise
    ],
)
def test_what_a_run_asks_for_and_draws(solver, asked, draws):
    shapes, shape = [], (2, 1, 3, 3)
    noise = Noise(0)
    states = trajectory(solver, 4, np.zeros(shape), lambda size: shapes.append(size) or noise.normal(size))
    np.testing.assert_allclose(plan(FLOW, solver, 4), asked, rtol=1e-15)
    assert [t for t, _ in states[:-1]] == list(plan(FLOW, solver, 4))
    assert shapes == [shape] * draws
    assert all(x.dtype == np.float64 and np.isfinite(x).all() for _, x in states)


@pytest.mark.parametrize("solver", FLOW_SOLVERS)
def test_an_exact_velocity_takes_one_step_of_euler_and_heun_to_the_data(solver):
    """x₀ - ε is constant along a straight line, so the ODE's solvers are exact at any number of steps."""
    data, noise = np.array([0.3, -2.0]), Noise(1).normal((2,)).astype(np.float64)
    end = trajectory(solver, 2, noise, lambda shape: np.zeros(shape, np.float32), lambda x, t: data - noise)[-1][1]
    assert (np.abs(end - data).max() < 1e-12) == (solver != "sde")


@pytest.mark.parametrize("solver", NOISE_SOLVERS)
def test_a_velocity_refuses_the_solvers_of_a_noise_schedule(solver):
    said = f"solver '{solver}' does not fit a model that predicts velocity; take one of euler, heun, sde".replace(
        "+", r"\+"
    )
    with pytest.raises(UsageError, match=said):
        plan(FLOW, solver, 10)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("solver", FLOW_SOLVERS)
def test_a_noise_schedule_refuses_the_solvers_of_a_velocity(solver, prediction):
    with pytest.raises(
        UsageError, match=rf"'{solver}' does not fit a model that predicts {prediction}; take one of ddpm"
    ):
        plan(Diffusion(prediction=prediction), solver, 10)


@pytest.mark.parametrize(
    ("solver", "steps", "options", "message"),
    [
        ("heun", 10, {"spacing": "leading"}, "spacing is 'leading' with solver heun; its steps are even"),
        ("euler", 10, {"eta": 0.5}, "eta is 0.5 with solver euler; only ddim takes it"),
        ("sde", 1, {}, "steps is 1 with solver sde; expected at least 2"),
        ("euler", 0, {}, "steps is 0; expected an integer from 1 to 1000"),
        ("heunn", 10, {}, 'did you mean "heun"'),
    ],
)
def test_bad_usage_is_refused_before_the_first_step(solver, steps, options, message):
    with pytest.raises(UsageError, match=message):
        solve(FLOW, solver, steps, np.zeros(3), Noise(0).normal, **options)
