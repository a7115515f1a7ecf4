import json

import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)

from dit_export.checkpoints.scheduler import read_scheduler_config
from dit_runtime.errors import UsageError
from dit_runtime.sampling.process import CURVES, Process, Sampler
from dit_runtime.sampling.schedule import timesteps

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # its np.array(tensor)

FLOW = "FlowMatchEulerDiscreteScheduler"
DPM = ("dpm++1", "dpm++", "dpm++3")
CLASSES = (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler)
MULTISTEP = {DPMSolverMultistepScheduler: DPM, UniPCMultistepScheduler: ("unipc1", "unipc", "unipc3")}
MULTISTEP[DEISMultistepScheduler] = ("dpm++1", "deis", "deis3")
DIT_XL_2_256 = {  # facebook/DiT-XL-2-256, scheduler/scheduler_config.json
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.12.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "trained_betas": None,
}


def saved(scheduler):
    """Return the configuration that `save_pretrained` writes."""
    return json.loads(scheduler.to_json_string())


def config(cls="DDIMScheduler", **fields):
    return {"_class_name": cls, **fields}


def in_words(settings):
    """The config with diffusers' defaults that we do not take over replaced: the fields of which it says nothing."""
    cannot_clip = settings["_class_name"].endswith("MultistepScheduler")
    own = {"clip_sample": False, "variance_type": "learned_range"}
    said = {key: value for key, value in settings.items() if value is not None and not (cannot_clip and key in own)}
    return settings | own | {key: value for key, value in said.items() if key in own}


def check(process, live):
    """Every field against the scheduler that diffusers itself makes."""
    theirs, sampler = live.config, process.sampler
    assert process.train_steps == theirs.num_train_timesteps
    assert (process.beta_schedule, process.beta_start, process.beta_end) == (
        theirs.beta_schedule,
        theirs.beta_start,
        theirs.beta_end,
    )
    assert process.prediction == theirs.prediction_type
    shared = "steps_offset clip_sample clip_sample_range set_alpha_to_one solver_type lower_order_final euler_at_final"
    for name in [*shared.split(), "final_sigmas_type"]:
        # A live config also holds another class's leftovers; only the fields of its own class count.
        if name in type(live)._get_init_keys(type(live)):
            if name == "solver_type" and not isinstance(live, DPMSolverMultistepScheduler):
                assert theirs[name] in (sampler.solver_type, "bh2", "logrho")  # theirs for any other class's
            else:
                assert getattr(sampler, name) == theirs[name], name
    if isinstance(live, DDPMScheduler):
        assert sampler.variance == theirs.variance_type
    solver = {DDIMScheduler: "ddim", DDPMScheduler: "ddpm"}.get(type(live)) or MULTISTEP[type(live)][1]
    live.set_timesteps(20)
    assert list(timesteps(process, solver, 20)) == live.timesteps.tolist()


@pytest.mark.parametrize("other", CLASSES)
@pytest.mark.parametrize(
    "settings",
    [
        DIT_XL_2_256,
        *(config(cls.__name__) for cls in CLASSES),
        config(clip_sample_range=2.0, steps_offset=1, timestep_spacing="trailing", set_alpha_to_one=False),
        config("DDPMScheduler", variance_type="learned_range", beta_schedule="scaled_linear", beta_end=0.012),
        config("DDPMScheduler", variance_type="fixed_large", timestep_spacing="linspace"),
        config(
            "DPMSolverMultistepScheduler",
            solver_type="heun",
            final_sigmas_type="sigma_min",
            euler_at_final=True,
            lower_order_final=False,
            clip_sample=False,  # left by the DDIMScheduler it was made from
            steps_offset=1,
            prediction_type="v_prediction",
        ),
        saved(DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-1.0)),
        saved(DDIMScheduler(timestep_spacing="trailing")),
    ],
)
def test_every_solver_gets_what_from_config_would_give_it(settings, other):
    check(read_scheduler_config(settings), other.from_config(in_words(settings)))


def test_the_solver_is_the_configs():
    assert read_scheduler_config(config("DDPMScheduler")).sampler.solver == "ddpm"
    assert read_scheduler_config(config("DDIMScheduler")).sampler.solver == "ddim"
    for cls, solvers in MULTISTEP.items():
        for order, solver in enumerate(solvers, 1):
            settings = config(cls.__name__, solver_order=order)
            assert read_scheduler_config(settings).sampler.solver == solver
    for order, solver in ((1, "sde-dpm++1"), (2, "sde-dpm++")):
        settings = config("DPMSolverMultistepScheduler", solver_order=order, algorithm_type="sde-dpmsolver++")
        assert read_scheduler_config(settings).sampler.solver == solver
    with pytest.raises(UsageError, match=r"solver_order = 3 is not supported with sde-dpm\+\+ \(supported: 1, 2\)"):
        read_scheduler_config(settings | {"solver_order": 3})


@pytest.mark.parametrize("curve", CURVES)
def test_a_curve_is_that_of_the_multistep_solvers(curve):
    """diffusers' DDIM and DDPM have none."""
    settings = config("UniPCMultistepScheduler", **{f"use_{curve}_sigmas": True}, timestep_spacing="trailing")
    process = read_scheduler_config(settings)
    assert (process.sampler.dpm_spacing, process.sampler.ddim_spacing) == (curve, "trailing")
    for cls in CLASSES:
        check(process, cls.from_config(in_words(settings)))
    other = "beta" if curve == "karras" else "karras"
    with pytest.raises(UsageError, match="are both True; expected one at most"):
        read_scheduler_config(settings | {f"use_{other}_sigmas": True})
    flow = read_scheduler_config(config(FLOW, **{f"use_{curve}_sigmas": True}), spacing="trailing")
    assert (flow.sampler.flow_spacing, flow.sampler.flow_curve) == ("trailing", curve)


@pytest.mark.parametrize(
    ("field", "value"),
    [("predict_x0", False), ("disable_corrector", [0]), ("solver_p", "x"), ("sigma_min", 0.1), ("shift_terminal", 0.1)],
)
def test_what_unipc_cannot_honour_is_refused(field, value):
    with pytest.raises(UsageError, match=f"{field} = .* is not supported"):
        read_scheduler_config(config("UniPCMultistepScheduler", **{field: value}))


def test_dit_xl_2_256_unclipped_leading_and_linspace():
    spacings = {"ddpm_spacing": "leading", "ddim_spacing": "leading", "dpm_spacing": "linspace"}
    expected = Sampler("ddim", **spacings, clip_sample=False, variance="learned_range")
    assert read_scheduler_config(DIT_XL_2_256) == Process(sampler=expected)


@pytest.mark.parametrize("cls", CLASSES)
def test_latents_are_clipped_only_where_the_config_says_so(cls):
    """diffusers clips where nothing is said: right for pixels, noise for latents."""
    assert not read_scheduler_config(config(cls.__name__)).sampler.clip_sample
    live = cls.from_config(config(cls.__name__)).config
    assert not read_scheduler_config(dict(live)).sampler.clip_sample
    said = read_scheduler_config(config(cls.__name__, clip_sample=True)).sampler.clip_sample
    assert said == (cls not in MULTISTEP)  # which has no such field: a leftover of another class


@pytest.mark.parametrize("cls", CLASSES)
def test_a_learned_variance_is_used_unless_the_config_says_another(cls):
    for settings in (config(cls.__name__), config(cls.__name__, variance_type=None)):
        assert read_scheduler_config(settings).sampler.variance == "learned_range"
        assert read_scheduler_config(settings, learned_variance=False).sampler.variance == "fixed_small"
    assert read_scheduler_config(config(cls.__name__, variance_type="fixed_small")).sampler.variance == "fixed_small"


def test_a_live_config_counts_only_what_its_file_said():
    live = DDIMScheduler.from_config(DIT_XL_2_256).config
    assert read_scheduler_config(dict(live)) == read_scheduler_config(DIT_XL_2_256)


def test_without_a_config_it_is_metas_way():
    assert read_scheduler_config(None) == Process()
    sampler = Process().sampler
    assert (sampler.solver, sampler.ddim_spacing, sampler.ddpm_spacing) == ("ddim", "stride", "respaced")
    assert (sampler.variance, sampler.clip_sample, sampler.set_alpha_to_one) == ("learned_range", False, True)
    assert read_scheduler_config(None, learned_variance=False).sampler.variance == "fixed_large"


def test_a_prediction_that_is_asked_for_agrees_with_the_config():
    settings = config("DDIMScheduler", prediction_type="v_prediction")
    assert read_scheduler_config(settings, prediction="v_prediction").prediction == "v_prediction"
    for asked, stored, said in (("velocity", settings, "v_prediction"), ("sample", config(), "epsilon")):
        with pytest.raises(
            UsageError, match=f"prediction '{asked}' was asked for, but the scheduler config says '{said}'"
        ):
            read_scheduler_config(stored, prediction=asked)
    assert read_scheduler_config(None, prediction="sample").prediction == "sample"


def test_logarithmic_variances_are_the_plain_ones():
    for kind in ("fixed_small", "fixed_large"):
        settings = config("DDPMScheduler", variance_type=f"{kind}_log")
        assert read_scheduler_config(settings).sampler.variance == kind


def test_trained_betas_and_infinite_clip():
    settings = config("DPMSolverMultistepScheduler", num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.3])
    settings = json.loads(json.dumps(settings | {"lambda_min_clipped": float("-inf")}))
    process = read_scheduler_config(settings)
    assert process.trained_betas == (0.1, 0.2, 0.3) and process.sampler.lambda_min_clipped is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("thresholding", True),
        ("rescale_betas_zero_snr", True),
        ("algorithm_type", "dpmsolver"),
        ("algorithm_type", "sde-dpmsolver"),
        ("use_karras_sigmas", "yes"),
        ("use_lu_lambdas", True),
        ("use_flow_sigmas", "yes"),
        ("use_dynamic_shifting", True),
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "flow_prediction"),
        ("prediction_type", "velocity"),
        ("timestep_spacing", "stride"),
        ("solver_type", "bh3"),
        ("solver_order", 4),
        ("final_sigmas_type", "half"),
        ("variance_type", "wild"),
    ],
)
def test_what_is_not_supported_is_refused_by_field_and_value(field, value):
    with pytest.raises(UsageError, match=rf"{field} = {value!r} is not supported \(supported: ".replace("+", r"\+")):
        read_scheduler_config(config("DPMSolverMultistepScheduler", **{field: value}))


def test_neutral_values_pass():
    idle = {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0, "flow_shift": 3.0, "time_shift_type": "linear"}
    assert read_scheduler_config(config(**idle, thresholding=False)) == read_scheduler_config(config())
    for cls in CLASSES:
        read_scheduler_config(saved(cls()))


def test_several_refusals_are_one_line_and_unknown_fields_suggest():
    with pytest.raises(UsageError) as error:
        read_scheduler_config(config(clip_smaple=False, thresholding=True, skip_prk_steps=True))
    message = str(error.value)
    assert 'clip_smaple = False is not known (did you mean "clip_sample"?)' in message
    assert "thresholding = True" in message and "skip_prk_steps" in message and "\n" not in message


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", None])
def test_unknown_classes_are_refused(name):
    with pytest.raises(UsageError, match=r"is not supported.*supported: DDIMScheduler, DDPMScheduler, DPMSolver"):
        read_scheduler_config({"_class_name": name})


def test_values_of_the_wrong_type_are_refused():
    with pytest.raises(UsageError, match="scheduler config: clip_sample is 'yes'; expected true or false"):
        read_scheduler_config(config(clip_sample="yes"))
    with pytest.raises(UsageError, match=r"scheduler config: trained_betas is 0.1"):
        read_scheduler_config(config(trained_betas=0.1))
    with pytest.raises(UsageError, match="scheduler config: train_steps is '1000'"):
        read_scheduler_config(config(num_train_timesteps="1000"))


def test_learned_variance_needs_a_model_that_has_it():
    with pytest.raises(UsageError, match="variance_type = 'learned_range' is not supported"):
        read_scheduler_config(config("DDPMScheduler", variance_type="learned_range"), learned_variance=False)
