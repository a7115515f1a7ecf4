"""The multistep solvers on a flow: diffusers' σ, timesteps and latents step by step, and their orders."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from dit_export.checkpoints.scheduler import read_scheduler_config
from dit_runtime.sampling.noise import Noise
from dit_runtime.sampling.process import SOLVERS, Process, Sampler, solver_of_order
from dit_runtime.sampling.schedule import flow_times, sigmas
from dit_runtime.sampling.solvers import plan
from tests.runtime.test_flow import MEAN, SPREAD, trajectory

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # its np.array(tensor)

DPM = tuple(solver_of_order("dpm++").values())
MULTISTEP_FIELDS = (("flow_shift", 1.0), ("flow_shift", 3.0), ("flow_shift", 0.5), ("num_train_timesteps", 500))


def multistep(steps, cls=DPMSolverMultistepScheduler, **config):
    """Our process, and diffusers' scheduler as Sana's pipeline sets it."""
    scheduler = cls(use_flow_sigmas=True, prediction_type="flow_prediction", **config)
    scheduler.set_timesteps(steps)
    said = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return read_scheduler_config({"_class_name": cls.__name__, **said}), scheduler


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        *((DPMSolverMultistepScheduler, {name: value}) for name, value in MULTISTEP_FIELDS),
        *((UniPCMultistepScheduler, {name: value}) for name, value in (*MULTISTEP_FIELDS, ("shift_terminal", 0.1))),
    ],
)
def test_sigmas_and_timesteps_are_the_multistep_schedulers(cls, config):
    """Bit for bit: the network reads ⌊1000 σ⌋, which the last bit of σ changes."""
    for steps in range(2 if "shift_terminal" in config else 1, 60):
        process, scheduler = multistep(steps, cls, **config)
        solver = process.sampler.solver
        np.testing.assert_array_equal(sigmas(process, solver, steps), scheduler.sigmas.numpy())
        times = flow_times(process, solver, steps)
        np.testing.assert_array_equal(times[:-1], np.float32(scheduler.timesteps / process.train_steps))
        np.testing.assert_array_equal(plan(process, solver, steps), times[:-1])
        assert steps < 10 or (times != sigmas(process, solver, steps)).any()  # rounded down


def worst_step(process, scheduler, steps, *, most=None, noisy=False, kind=torch.float32):
    """The worst difference over the first steps, both run freely from one noise; diffusers keeps σ and x in float32."""
    model = lambda x, sigma: np.tanh(x + sigma) - 0.5 * x  # noqa: E731
    stream, generator = Noise(3), torch.Generator().manual_seed(3)
    shape, solver = (2, 4, 4, 4), process.sampler.solver
    noise, theirs = stream.normal(shape), torch.randn(shape, generator=generator).to(kind)
    states = trajectory(solver, steps, noise, stream.normal, model, process)
    assert len(states) == steps + 1
    worst = 0.0
    for t, (_, after) in list(zip(scheduler.timesteps, states[1:], strict=True))[:most]:
        output = torch.from_numpy(model(theirs.numpy(), int(t) / 1000)).to(kind)
        theirs = scheduler.step(output, t, theirs, **{"generator": generator} if noisy else {}).prev_sample
        worst = max(worst, np.abs(after - theirs.numpy()).max())
    return worst


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
def test_multistep_latents_are_diffusers_step_by_step(order, kind):
    for steps, lower, euler in product((1, 2, 3, 10, 14, 15, 28), (True, False), (True, False)):
        switches = {"solver_type": kind, "lower_order_final": lower, "euler_at_final": euler, "solver_order": order}
        process, scheduler = multistep(steps, flow_shift=3.0, **switches)
        assert SOLVERS[process.sampler.solver]["order"] == order
        assert worst_step(process, scheduler, steps) < 1e-5  # 2.5e-6 was measured


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
def test_noisy_latents_are_diffusers_step_by_step(order, kind):
    for steps in (1, 3, 10, 28):
        config = {"solver_type": kind, "solver_order": order, "algorithm_type": "sde-dpmsolver++", "flow_shift": 3.0}
        process, scheduler = multistep(steps, **config)
        assert process.sampler.solver == solver_of_order("sde-dpm++")[order]
        assert worst_step(process, scheduler, steps, noisy=True) < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
def test_unipc_latents_are_diffusers_step_by_step(order, kind):
    """Bar the first step's α of 1e-6, whose float32 is off by 1 %: so the shift leaves no σ near 1."""
    for steps in (1, 2, 3, 10, 28):
        switches = {"solver_type": kind, "solver_order": order, "flow_shift": 3.0}
        process, scheduler = multistep(steps, UniPCMultistepScheduler, **switches)
        assert process.sampler.solver == solver_of_order("unipc")[order]
        assert worst_step(process, scheduler, steps) < 1e-5


@pytest.mark.parametrize("order", [2, 3])
def test_deis_latents_are_diffusers_step_by_step(order):
    """But for the last step, where diffusers repeats its last σ and so goes nowhere: its reading is refused."""
    solver = solver_of_order("deis")[order]
    for steps in (10, 28):
        scheduler = DEISMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=order
        )
        scheduler.set_timesteps(steps)
        scheduler.sigmas = scheduler.sigmas.double()  # in float32 its differences of near logarithms lose 5e-5
        sampler = Sampler(solver=solver, flow_spacing="discrete")
        process = Process(prediction="velocity", shift=3.0, sampler=sampler)
        assert worst_step(process, scheduler, steps, most=steps - 1, kind=torch.float64) < 1e-5


@pytest.mark.parametrize("solver", DPM)
def test_other_orders_and_switches_are_seen(solver):
    model = lambda x, sigma: np.tanh(x + sigma) - 0.5 * x  # noqa: E731
    noise = Noise(3).normal((2, 4, 4, 4))

    def end(solver=solver, **sampler):
        process = Process(
            prediction="velocity", shift=3.0, sampler=Sampler(solver=solver, flow_spacing="discrete", **sampler)
        )
        return trajectory(solver, 10, noise, model=model, process=process)[-1][1]

    usual = end()
    others = [end(next(other for other in DPM if other != solver))]
    if solver == "dpm++":
        others += [end(solver_type="heun")]
    if solver == "dpm++3":
        others += [end(lower_order_final=False)]
    assert all(np.abs(other - usual).max() > 1e-4 for other in others)


@pytest.mark.parametrize(
    ("solver", "low", "high"),
    [
        ("dpm++1", 0.97, 1.03),  # measured 0.997 and 0.998
        ("dpm++", 1.75, 2.05),  # measured 1.785 and 1.814: log N / N², for the first and last steps have no end in λ
        ("dpm++3", 2.1, 2.5),  # measured 2.22 and 2.24
        ("unipc1", 1.8, 2.0),  # measured 1.84 and 1.87
        ("unipc", 1.9, 2.2),  # measured 2.05 and 1.96
        ("unipc3", 2.0, 2.4),  # measured 2.11 and 2.30
    ],
)
def test_error_of_the_multistep_solvers(solver, low, high):
    x = np.array([-1.5, 0.3, 2.0])
    ends = [trajectory(solver, steps, x)[-1][1] for steps in (160, 320, 640)]
    errors = [np.abs(end - (MEAN + SPREAD * x)).max() for end in ends]
    for coarse, fine in pairwise(errors):
        assert low < np.log2(coarse / fine) < high
