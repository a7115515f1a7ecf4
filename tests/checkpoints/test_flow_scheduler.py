"""Configs of flows: FlowMatchEulerDiscreteScheduler, the multistep classes with use_flow_sigmas, SCMScheduler."""

import math

import pytest
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dit_export.checkpoints.scheduler import read_scheduler_config
from dit_runtime.errors import UsageError
from dit_runtime.sampling.process import Process, Sampler
from tests.checkpoints.test_scheduler import FLOW, MULTISTEP, config, saved


def test_a_static_shift_is_sd3s():
    flow = read_scheduler_config(config(FLOW, num_train_timesteps=1000, shift=3.0))
    assert flow.kind == "flow" and flow.prediction == "velocity" and flow.shift == 3.0
    assert (flow.sampler.solver, flow.sampler.flow_spacing) == ("euler", "linspace")
    live = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert flow.sigma_min == live.sigma_min  # shifted once, and again with a run's other σ: diffusers' way
    assert read_scheduler_config(saved(live)) == flow
    assert read_scheduler_config(config(FLOW), spacing="trailing").sampler.flow_spacing == "trailing"
    assert read_scheduler_config(config(FLOW), prediction="velocity") == read_scheduler_config(config(FLOW))


def test_a_dynamic_shift_is_settled_for_the_networks_tokens():
    """Flux.1's config: μ is 0.5 at 256 tokens and 1.15 at 4096."""
    dynamic = config(FLOW, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        assert read_scheduler_config(dynamic, tokens=tokens).shift == pytest.approx(math.exp(mu), rel=1e-14)
        linear = dynamic | {"time_shift_type": "linear"}
        assert read_scheduler_config(linear, tokens=tokens).shift == pytest.approx(mu, rel=1e-14)
    flow = read_scheduler_config(dynamic, tokens=1024)
    assert flow.sampler.flow_spacing == "trailing" and flow.sigma_min == pytest.approx(0.001, rel=1e-7)
    other = dynamic | {"base_image_seq_len": 1024, "max_image_seq_len": 2048}
    assert read_scheduler_config(other, tokens=1024).shift == pytest.approx(math.exp(0.5), rel=1e-14)
    with pytest.raises(UsageError, match="use_dynamic_shifting = True needs the count of image tokens"):
        read_scheduler_config(dynamic)


def test_a_terminal_shift_is_read_and_zero_is_none():
    assert read_scheduler_config(config(FLOW, shift_terminal=0.1)).shift_terminal == 0.1
    for value in (None, 0, 0.0):
        assert read_scheduler_config(config(FLOW, shift_terminal=value)).shift_terminal is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("invert_sigmas", True, "invert_sigmas = True is not supported"),
        ("stochastic_sampling", True, "stochastic_sampling = True is not supported"),
        ("time_shift_type", "cubic", "time_shift_type = 'cubic' is not supported"),
        ("use_dynamic_shifting", "yes", "use_dynamic_shifting = 'yes' is not supported"),
        ("beta_start", 0.1, "beta_start = 0.1 is not known"),
        ("shfit", 3.0, r'shfit = 3.0 is not known \(did you mean "shift"'),
        ("shift", 0, "shift is 0; expected a number above 0"),
        ("shift", "3", "shift is '3'; expected a finite number"),
        ("shift_terminal", 2, "shift_terminal is 2; expected a number between 0 and 1"),
        ("num_train_timesteps", 1, "train_steps is 1; expected an integer from 2"),
    ],
)
def test_what_a_flow_cannot_honour_is_refused(field, value, message):
    with pytest.raises(UsageError, match=f"scheduler config: {message}"):
        read_scheduler_config(config(FLOW, **{field: value}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_shift": None}, "base_shift is None; expected a finite number"),
        ({"max_image_seq_len": 256}, "are both 256"),
        ({"max_shift": -9.0, "time_shift_type": "linear"}, "shift is -.*; expected a number above 0"),
    ],
)
def test_a_dynamic_shift_that_cannot_be_made_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        read_scheduler_config(config(FLOW, use_dynamic_shifting=True, **fields), tokens=4096)


def multistep_flow(cls=DPMSolverMultistepScheduler, **fields):
    """As Sana's: flow_prediction on flow sigmas, and what is left of the noise schedule of the class."""
    defaults = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return config(cls.__name__, **defaults | fields)


def test_a_multistep_flow_is_sanas():
    flow = read_scheduler_config(multistep_flow())
    assert (flow.kind, flow.prediction, flow.shift, flow.train_steps) == ("flow", "velocity", 3.0, 1000)
    assert (flow.sampler.solver, flow.sampler.flow_spacing) == ("dpm++", "discrete")
    live = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    assert read_scheduler_config(saved(live)) == flow
    assert read_scheduler_config(saved(live), prediction="velocity", tokens=64, spacing="linspace") == flow
    assert read_scheduler_config(multistep_flow(beta_start=0.3, timestep_spacing="trailing")) == flow
    switches = {"solver_type": "heun", "lower_order_final": False, "euler_at_final": True}
    for cls in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        for order, solver in enumerate(MULTISTEP[cls], 1):
            sampler = Sampler(solver, flow_spacing="discrete", **switches)
            assert read_scheduler_config(multistep_flow(cls, solver_order=order, **switches)).sampler == sampler
    terminal = multistep_flow(UniPCMultistepScheduler, shift_terminal=0.1)
    assert read_scheduler_config(terminal).shift_terminal == 0.1
    noisy = multistep_flow(algorithm_type="sde-dpmsolver++")
    assert read_scheduler_config(noisy).sampler.solver == "sde-dpm++"
    with pytest.raises(UsageError, match="use_flow_sigmas = True is not supported"):  # its last step would be none
        read_scheduler_config(multistep_flow(DEISMultistepScheduler))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type = 'epsilon' is not supported .supported: flow_prediction"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min' is not supported"),
        ({"algorithm_type": "dpmsolver"}, "algorithm_type = 'dpmsolver' is not supported"),
        ({"shift_terminal": 0.1}, "shift_terminal = 0.1 is not supported"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas = True is not supported"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting = True is not supported"),
        ({"solver_order": 4}, "solver_order = 4 is not supported"),
        ({"flow_shift": 0}, "shift is 0; expected a number above 0"),
        ({"flow_shfit": 3.0}, r"flow_shfit = 3.0 is not known \(did you mean \"flow_shift\""),
    ],
)
def test_what_a_multistep_flow_cannot_honour_is_refused(fields, message):
    with pytest.raises(UsageError, match=f"scheduler config: .*{message}"):
        read_scheduler_config(multistep_flow(**fields))


def test_a_consistency_scheduler_is_a_flow():
    settings = config("SCMScheduler", num_train_timesteps=1000, prediction_type="trigflow", sigma_data=0.5)
    flow = read_scheduler_config(settings)
    assert flow == Process(prediction="velocity", sampler=Sampler(solver="scm"))
    with pytest.raises(UsageError, match=r"prediction_type = 'sample' is not supported .supported: trigflow"):
        read_scheduler_config(settings | {"prediction_type": "sample"})


def test_a_flow_predicts_a_velocity():
    with pytest.raises(
        UsageError, match="prediction 'epsilon' was asked for, but the scheduler config says 'velocity'"
    ):
        read_scheduler_config(config(FLOW), prediction="epsilon")
