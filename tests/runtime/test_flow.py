"""Flows: σ and steps of diffusers' two schedulers, the solvers on Gaussian data where the answer is known, SiT."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SCMScheduler

from dit_export.checkpoints.scheduler import read_scheduler_config
from dit_runtime.errors import UsageError
from dit_runtime.sampling.noise import Noise
from dit_runtime.sampling.process import FLOW_SOLVERS, NOISE_SOLVERS, Process, Sampler
from dit_runtime.sampling.schedule import sigmas
from dit_runtime.sampling.solvers import plan, solve

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # its np.array(tensor)

FLOW = Process(prediction="velocity", sampler=Sampler(solver="euler"))  # SiT's
SHIFTED = Process(prediction="velocity", shift=3.0, sampler=Sampler(solver="euler", flow_spacing="linspace"))  # SD3's
SIT = ("euler", "heun", "sde")  # its solvers
NOISY = ("sde", "scm", "sde-dpm++1", "sde-dpm++")
MEAN, SPREAD = 0.7, 0.5  # of the data
TOKENS = 1024
COUNTS = (1, 2, 5, 10, 28, 50)


def spread(sigma):
    """Return the standard deviation of x = (1 - σ) x₀ + σ ε."""
    return np.sqrt(((1 - sigma) * SPREAD) ** 2 + sigma**2)


def velocity(x, sigma):
    """E[ε - x₀ | x]: with it x - (1 - σ) MEAN stays in proportion to the spread, so the end is MEAN + SPREAD x_T."""
    t = 1 - sigma
    return -MEAN - (t * SPREAD**2 - sigma) / spread(sigma) ** 2 * (x - t * MEAN)


def trajectory(solver, steps, x, draw=None, model=velocity, process=FLOW, **options):
    """Every (σ, x there) of a run, the end with σ = 0."""
    run = solve(process, solver, steps, x, draw, **options)
    state, sigma = next(run)
    states = []
    try:
        while True:
            states.append((sigma, state))
            state, sigma = run.send((model(state, sigma), None))
    except StopIteration as stop:
        return [*states, (0.0, stop.value)]


# diffusers' scheduler

CONFIGS = [
    {},
    {"shift": 3.0},
    {"shift": 0.5, "shift_terminal": 0.02},
    {"shift": 7.0, "num_train_timesteps": 500},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "shift": 3.0, "shift_terminal": 0.1},
    {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.7, "max_image_seq_len": 2048},
]


def calculate_shift(tokens, base_tokens, max_tokens, base_shift, max_shift):
    """As diffusers' pipelines of Flux and SD3 have it (they need transformers to be imported)."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return tokens * slope + base_shift - slope * base_tokens


def both(config, steps, spacing):
    """Our process, and diffusers' scheduler after set_timesteps as SD3's ("linspace") or Flux's pipeline calls it."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    options = {}
    if config.get("use_dynamic_shifting"):
        options["mu"] = calculate_shift(TOKENS, *(scheduler.config.get(name) for name in names))
    if spacing == "trailing":
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(None if "sigmas" in options else steps, **options)
    said = {"_class_name": "FlowMatchEulerDiscreteScheduler", **config}
    return read_scheduler_config(said, tokens=TOKENS, spacing=spacing), scheduler


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("config", CONFIGS)
def test_sigmas_are_diffusers(config, spacing):
    for steps in COUNTS:
        if config.get("shift_terminal") and steps == 1:
            continue  # not a number in diffusers
        process, scheduler = both(config, steps, spacing)
        ours, theirs = sigmas(process, "euler", steps), scheduler.sigmas.numpy()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)  # float32 of both; 1.2e-7 was measured
        assert ours[0] == 1 and ours[-1] == 0 and (ours == ours.astype(np.float32)).all()
        if config.get("shift_terminal"):
            assert ours[-2] == np.float32(config["shift_terminal"])
        np.testing.assert_array_equal(plan(process, "euler", steps), ours[:-1])


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("config", CONFIGS)
def test_latents_are_diffusers_step_by_step(config, spacing):
    """Both run freely from one noise; diffusers keeps σ and x in float32."""
    for steps in (2, 10, 28):
        process, scheduler = both(config, steps, spacing)
        noise = Noise(3).normal((2, 4, 4, 4))
        model = lambda x, sigma: np.tanh(x + sigma) - 0.5 * x  # noqa: E731
        theirs = torch.from_numpy(noise)
        states = trajectory("euler", steps, noise, model=model, process=process)
        for t, (_, after) in zip(scheduler.timesteps, states[1:], strict=True):
            sigma = float(t) / process.train_steps
            output = torch.from_numpy(model(theirs.numpy(), sigma).astype(np.float32))
            theirs = scheduler.step(output, t, theirs).prev_sample
            assert np.abs(after - theirs.numpy()).max() < 1e-5  # 1.2e-6 was measured


def test_another_shift_is_seen():
    """The tests above could pass on a shift that is ignored."""
    ours = sigmas(SHIFTED, "euler", 10)
    assert np.abs(ours - sigmas(FLOW, "euler", 10)).max() > 0.1
    assert np.abs(ours - sigmas(SHIFTED, "euler", 10, "trailing")).max() > 1e-3


# diffusers' scheduler of consistency networks


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_is_diffusers_step_by_step(steps):
    """Sana-Sprint's pipeline turns a flow's network into the scheduler's, scales by sigma_data, and draws for each
    step."""
    scheduler, shape = SCMScheduler(sigma_data=0.5), (2, 4, 4, 4)
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    process = read_scheduler_config({"_class_name": "SCMScheduler", "sigma_data": 0.5})
    model = lambda x, sigma: np.tanh(x + sigma) - 0.5 * x  # noqa: E731
    ours = trajectory("scm", steps, (noise := Noise(3)).normal(shape), noise.normal, model, process)
    generator = torch.Generator().manual_seed(3)
    theirs = torch.randn(shape, generator=generator) * 0.5
    assert len(ours) == steps + 1
    for angle, (sigma, _), (_, after) in zip(scheduler.timesteps[:-1], ours, ours[1:], strict=False):
        share = torch.sin(angle) / (torch.cos(angle) + torch.sin(angle))
        assert abs(float(share) - sigma) < 2e-7  # float32
        norm = torch.sqrt(share**2 + (1 - share) ** 2)
        x = theirs / 0.5 * norm
        velocity = torch.from_numpy(model(x.numpy(), float(share)).astype(np.float32))
        output = ((1 - 2 * share) * x + norm**2 * velocity) / norm * 0.5
        theirs, data = scheduler.step(output, angle, theirs, generator=generator, return_dict=False)
        following = scheduler.timesteps[scheduler.step_index]
        expected = theirs / 0.5 / (torch.cos(following) + torch.sin(following)) if following else data / 0.5
        # The noise at the first angle, 1.5708, is a flow's times 1 + 4e-6. 5e-6 was measured, of states above 1.
        assert np.abs(after - expected.numpy()).max() < 1e-5 * max(1, np.abs(after).max())
    other = trajectory("euler", steps, Noise(3).normal(shape), model=model)[-1][1]
    assert np.abs(other - ours[-1][1]).max() > (0.01 if steps > 1 else 0)


# SiT's own code


def sit(solver, steps, x, draw):
    """Ma et al.'s sampling in t, from 0 (noise) to 1 (data), of the velocity dx/dt, with w = 1 - t and the score."""

    def ahead(x, t):
        return -velocity(x, 1 - t)

    if solver == "sde":
        last = 0.04
        times = np.linspace(0, 1 - last, steps)
        dt = times[1]
        drift = lambda x, t: ahead(x, t) + (t * ahead(x, t) - x)  # noqa: E731
        for t in times[:-1]:
            x = x + dt * drift(x, t) + math.sqrt(2 * (1 - t) * dt) * draw(x.shape)
        return x + last * drift(x, 1 - last)
    for t, after in pairwise(np.arange(steps + 1) / steps):
        v = ahead(x, t)
        if solver == "heun":
            v = (v + ahead(x + (after - t) * v, after)) / 2
        x = x + (after - t) * v
    return x


@pytest.mark.parametrize("solver", SIT)
@pytest.mark.parametrize("steps", [2, 10, 50])
def test_sit_is_a_flow_without_a_shift(solver, steps):
    x = Noise(5).normal((64,)).astype(np.float64)
    ours = trajectory(solver, steps, x, Noise(6).normal)[-1][1]
    # σ is rounded to float32: 3e-8 of a path, more where the SDE's score divides by it. 5e-7 was measured.
    np.testing.assert_allclose(ours, sit(solver, steps, x, Noise(6).normal), rtol=0, atol=2e-6)


# Order, marginals, draws


@pytest.mark.parametrize(
    ("solver", "process", "low", "high"),
    [
        ("euler", FLOW, 0.97, 1.03),  # measured 0.987 and 0.993
        ("heun", FLOW, 1.93, 2.05),  # measured 1.950 and 1.976
        ("euler", SHIFTED, 0.96, 1.03),  # measured 0.976 and 0.987
        ("heun", SHIFTED, 1.95, 2.4),  # measured 2.38 and 2.25, falling to 2
    ],
)
def test_error_falls_with_the_solvers_order(solver, process, low, high):
    x = np.array([-1.5, 0.3, 2.0])
    ends = [trajectory(solver, steps, x, process=process, spacing="trailing")[-1][1] for steps in (40, 80, 160)]
    errors = [np.abs(end - (MEAN + SPREAD * x)).max() for end in ends]
    for coarse, fine in pairwise(errors):
        assert low < np.log2(coarse / fine) < high


def off(scale):
    """The largest error of mean and spread of 20,000 paths of the SDE, in units of the data's spread."""
    random = np.random.default_rng(5)

    def draw(shape):
        return scale * random.standard_normal(shape, dtype=np.float32)

    states = trajectory("sde", 100, random.standard_normal(20_000), draw)[10:-1]
    errors = [(x.mean() - (1 - sigma) * MEAN, x.std() - spread(sigma)) for sigma, x in states]
    return np.abs(errors).max() / SPREAD


def test_the_sde_has_the_marginals_of_the_data_at_every_sigma():
    """Measured 0.025: the statistics of 20,000 numbers, and 100 steps of order 1."""
    assert off(1.0) < 0.04
    assert off(0.9) > 0.08 < off(1.1)  # 10 % less noise, or more: 0.092 and 0.094


def test_the_sde_ends_with_its_drift_alone():
    """The last step, from σ = 0.04, is one step of the drift (2 - σ)(x₀ - ε) - x. It halves none of the noise that is
    left."""
    data, noise = 0.4, -1.1
    end = trajectory(
        "sde", 25, np.zeros(3), lambda shape: np.zeros(shape, np.float32), lambda x, sigma: noise - data + 0 * x
    )
    (sigma, before), (_, after) = end[-2:]
    assert sigma == np.float32(0.04)
    drift = (2 - sigma) * (data - noise) - before
    np.testing.assert_allclose(after, before + sigma * drift, rtol=1e-12)  # float64


@pytest.mark.parametrize(
    ("solver", "asked", "draws"),
    [
        ("euler", [1, 0.75, 0.5, 0.25], 0),
        ("heun", [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0], 0),
        ("scm", np.sin(a := 0.3927 * np.arange(4, 0, -1)) / (np.sin(a) + np.cos(a)), 3),
        ("sde", [1, 0.68, 0.36, 0.04], 3),  # as its authors': four points, and a last step of 0.04 without noise
    ],
)
def test_what_a_run_asks_for_and_draws(solver, asked, draws):
    shapes, shape = [], (2, 1, 3, 3)
    noise = Noise(0)
    states = trajectory(solver, 4, np.zeros(shape), lambda size: shapes.append(size) or noise.normal(size))
    np.testing.assert_array_equal(plan(FLOW, solver, 4), np.float32(asked))
    assert [sigma for sigma, _ in states[:-1]] == list(plan(FLOW, solver, 4))
    assert shapes == [shape] * draws
    assert all(x.dtype == np.float64 and np.isfinite(x).all() for _, x in states)


@pytest.mark.parametrize("solver", FLOW_SOLVERS)
def test_an_exact_velocity_takes_one_step_of_euler_and_heun_to_the_data(solver):
    """ε - x₀ is constant along a straight line, so the ODE's solvers are exact at any number of steps."""
    data, noise = np.array([0.3, -2.0]), Noise(1).normal((2,)).astype(np.float64)
    end = trajectory(solver, 2, noise, lambda shape: np.zeros(shape, np.float32), lambda x, sigma: noise - data)[-1][1]
    close = 1e-5 if solver.startswith(("unipc", "deis")) else 1e-12  # these start at σ = 1 - 1e-6
    assert (np.abs(end - data).max() < close) == (solver not in NOISY)


@pytest.mark.parametrize("solver", [name for name in NOISE_SOLVERS if name not in FLOW_SOLVERS])
def test_a_velocity_refuses_the_solvers_of_a_noise_schedule(solver):
    said = f"solver '{solver}' does not fit a model that predicts velocity; take one of dpm++1, dpm++, dpm++3, euler"
    with pytest.raises(UsageError, match=re.escape(said)):
        plan(FLOW, solver, 10)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("solver", [name for name in FLOW_SOLVERS if name not in NOISE_SOLVERS])
def test_a_noise_schedule_refuses_the_solvers_of_a_velocity(solver, prediction):
    with pytest.raises(
        UsageError, match=rf"'{solver}' does not fit a model that predicts {prediction}; take one of ddpm"
    ):
        plan(Process(prediction=prediction), solver, 10)


@pytest.mark.parametrize(
    ("solver", "steps", "options", "message"),
    [
        (
            "heun",
            10,
            {"spacing": "leading"},
            "spacing is 'leading' with solver heun; take one of trailing, linspace, discrete, integer",
        ),
        ("sde", 10, {"spacing": "trailing"}, "spacing is 'trailing' with solver sde; its steps are even"),
        ("scm", 2, {"spacing": "linspace"}, "spacing is 'linspace' with solver scm; its angles are even from 1.5708"),
        ("euler", 10, {"eta": 0.5}, "eta is 0.5 with solver euler; only ddim takes it"),
        ("sde", 1, {}, "steps is 1 with solver sde; expected at least 2"),
        ("euler", 0, {}, "steps is 0; expected an integer from 1 to 1000"),
        ("heunn", 10, {}, 'did you mean "heun"'),
    ],
)
def test_bad_usage_is_refused_before_the_first_step(solver, steps, options, message):
    with pytest.raises(UsageError, match=message):
        solve(FLOW, solver, steps, np.zeros(3), Noise(0).normal, **options)


def test_a_terminal_shift_needs_two_steps():
    with pytest.raises(UsageError, match="steps is 1; expected at least 2, for shift_terminal"):
        plan(Process(prediction="velocity", shift_terminal=0.1, sampler=Sampler(solver="euler")), "euler", 1)
