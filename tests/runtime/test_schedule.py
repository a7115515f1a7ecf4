import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)

from dit_runtime.errors import UsageError
from dit_runtime.sampling.curves import BETA, beta_quantile, curve
from dit_runtime.sampling.process import CURVES, Process, Sampler
from dit_runtime.sampling.schedule import make_schedule, timesteps

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # its np.array(tensor)

FLOAT32 = 3e-5  # diffusers multiplies 1000 factors up in float32; 1.3e-5 relative was measured
SPACINGS = ("leading", "trailing", "linspace")
COUNTS = (1, 2, 3, 7, 10, 25, 33, 48, 50, 96, 250, 333, 480)  # none where diffusers' "trailing" overruns


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alpha_bar_is_diffusers(name):
    process = Process(beta_schedule=name, beta_start=0.00085, beta_end=0.012)
    reference = DDPMScheduler(beta_schedule=name, beta_start=0.00085, beta_end=0.012)
    np.testing.assert_allclose(process.alpha_bar, reference.alphas_cumprod.numpy(), rtol=FLOAT32)


def test_linear_betas_are_written_in_plain_arithmetic():
    """The betas match the loop of the C++ side bit for bit."""
    step = (0.02 - 1e-4) / 999
    plain = [1e-4 + index * step for index in range(999)] + [0.02]
    np.testing.assert_array_equal(Process().betas, np.array(plain))


def test_trained_betas_replace_the_schedule():
    betas = (0.1, 0.2, 0.3)
    np.testing.assert_allclose(Process(train_steps=3, trained_betas=betas).alpha_bar, [0.9, 0.72, 0.504])


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("solver", "scheduler"),
    [("ddim", DDIMScheduler), ("ddpm", DDPMScheduler), ("dpm++", DPMSolverMultistepScheduler)],
)
def test_timesteps_are_diffusers(solver, scheduler, spacing, offset):
    reference = scheduler(timestep_spacing=spacing, steps_offset=offset)
    process = Process(sampler=Sampler(steps_offset=offset))
    for steps in COUNTS:
        reference.set_timesteps(steps)
        np.testing.assert_array_equal(timesteps(process, solver, steps, spacing), reference.timesteps.numpy())


def test_trailing_is_diffusers_at_every_count_but_for_its_overruns():
    reference = DDIMScheduler(timestep_spacing="trailing")
    for steps in range(1, 1001):
        reference.set_timesteps(steps)
        expected = reference.timesteps.numpy()
        assert len(expected) == steps or expected[-1] == -1
        np.testing.assert_array_equal(timesteps(Process(), "ddim", steps, "trailing"), expected[:steps])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_clipped_lambdas_shorten_the_range(spacing):
    reference = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-1, timestep_spacing=spacing
    )
    process = Process(beta_schedule="squaredcos_cap_v2", sampler=Sampler(lambda_min_clipped=-1))
    reference.set_timesteps(20)
    ours = timesteps(process, "dpm++", 20, spacing)
    np.testing.assert_array_equal(ours, reference.timesteps.numpy())
    assert ours[0] < 800


def test_the_quantiles_of_the_beta_distribution_are_scipys():
    for probabilities in (np.linspace(0, 1, 2001), np.logspace(-12, -1, 100), 1 - np.logspace(-12, -1, 100)):
        ours, theirs = beta_quantile(probabilities), scipy.stats.beta.ppf(probabilities, BETA, BETA)
        np.testing.assert_allclose(ours, theirs, rtol=2e-14, atol=0)  # 1.6e-15 was measured
    assert np.abs(beta_quantile(np.array([0.1])) - scipy.stats.beta.ppf(0.1, 0.61, 0.61)) > 1e-4


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_keeps_both_ends_and_falls(name):
    for steps in (2, 3, 50):
        points = curve(name, 150.0, 0.01, steps)
        np.testing.assert_allclose(points[[0, -1]], [150, 0.01], rtol=1e-12)
        assert (np.diff(points) < 0).all()
    assert curve(name, 150.0, 0.01, 1) == pytest.approx([150], rel=1e-12)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_curves_are_diffusers(betas, scheduler, name):
    """Its float32 logarithms can lose a step at the noisy end, and anywhere between two steps by chance."""
    process = Process(beta_schedule=betas, beta_start=0.00085, beta_end=0.012)
    solver = {"D": "dpm++", "U": "unipc"}[scheduler.__name__[0]] if scheduler is not DEISMultistepScheduler else "deis"
    reference = scheduler(beta_schedule=betas, beta_start=0.00085, beta_end=0.012, **{f"use_{name}_sigmas": True})
    for steps in (1, 2, 7, 25, 100):
        reference.set_timesteps(steps)
        ours, theirs = timesteps(process, solver, steps, name), reference.timesteps.numpy()
        assert (ours != theirs).sum() <= 3 and np.abs(ours - theirs).max() <= 1
        assert steps == 1 or (ours[0], ours[-1]) == (999, 0)
        ratios = [step.now.sigma / step.now.alpha for step in make_schedule(process, solver, steps, name)]
        np.testing.assert_allclose(ratios, reference.sigmas.numpy()[:-1], rtol=3e-4)  # of a cosine's; else 1.3e-5


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++", "unipc"])
def test_listed_timesteps_are_the_runs(solver):
    """diffusers' DPM-Solver++ takes such a list too."""
    process, asked = Process(), [999, 640, 41, 0]
    levels = process.alpha_bar
    steps = make_schedule(process, solver, 4, "999, 640.0,41,0")
    assert [step.now.time for step in steps] == asked
    np.testing.assert_allclose([step.now.alpha**2 for step in steps], levels[asked], rtol=1e-15)
    np.testing.assert_allclose([step.after.alpha**2 for step in steps], [*levels[asked[1:]], 1], rtol=1e-15)
    reference = DPMSolverMultistepScheduler()
    reference.set_timesteps(timesteps=asked)
    np.testing.assert_allclose(
        [step.now.sigma / step.now.alpha for step in steps], reference.sigmas[:-1].to(torch.float64), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ("999, 640", "steps is 3; expected 2, for spacing lists so many times"),
        ("1000, 640, 0", "expected training steps, from 999 down to 0"),
        ("999, 640, -1", "expected training steps, from 999 down to 0"),
        ("999, 640.5, 0", "expected training steps, from 999 down to 0"),
        ("640, 999, 0", "expected a name, or falling times as in '999, 640, 300'"),
        ("640, 640, 0", "expected a name, or falling times"),
        ("999, 640, x", "expected a name, or falling times"),
        ("999, 640, NaN", "expected a name, or falling times"),
        ("999, 640, [0]", "expected a name, or falling times"),
        ("999, 640, true", "expected a name, or falling times"),
        ("9" * 400 + ", 640, 0", "expected a name, or falling times"),
        ("9, " + "[" * 100_000, "expected a name, or falling times"),
    ],
)
def test_lists_that_are_no_path_are_refused(spacing, message):
    with pytest.raises(UsageError, match=message):
        timesteps(Process(), "dpm++", 3, spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_range_that_is_clipped_away_is_refused(spacing, steps):
    """diffusers would ask for t = -1, for t = 0 again and again, or for nothing."""
    clipped = Process(sampler=Sampler(lambda_min_clipped=100))
    with pytest.raises(UsageError, match="lambda_min_clipped is 100: it leaves none of the 1000 timesteps"):
        timesteps(clipped, "dpm++", steps, spacing)
    almost = Process(sampler=Sampler(lambda_min_clipped=4.6))  # log(α/σ) is 4.60 at t = 0
    assert timesteps(almost, "dpm++", 1, spacing) == [0]


def improved_ddpm(steps, strided, total=1000):
    """The set of kept steps, after Improved DDPM's space_timesteps for one section."""
    if strided:
        return next(
            list(range(0, total, stride)) for stride in range(1, total) if len(range(0, total, stride)) == steps
        )
    taken, position = [], 0.0
    for _ in range(steps):
        taken.append(round(position))
        position += (total - 1) / (steps - 1) if steps > 1 else 1
    return taken


def test_respaced_is_improved_ddpms_section_at_every_count():
    for steps in range(1, 1001):
        expected = improved_ddpm(steps, strided=False)[::-1]
        np.testing.assert_array_equal(timesteps(Process(), "ddpm", steps, "respaced"), expected)


@pytest.mark.parametrize("steps", [2, 3, 10, 25, 50, 63, 250, 334, 1000])
def test_stride_is_improved_ddpms_ddim_n(steps):
    expected = improved_ddpm(steps, strided=True)[::-1]
    np.testing.assert_array_equal(timesteps(Process(), "ddim", steps, "stride"), expected)


def test_the_nearest_strides_are_suggested():
    with pytest.raises(UsageError, match=r"60 steps have no integer stride .* 59 and 63 .*'respaced'"):
        timesteps(Process(), "ddim", 60)


def columns(steps):
    """The training steps, ᾱ before and ᾱ after."""
    times = np.array([int(step.now.time) for step in steps])
    for level in (level for step in steps for level in step):
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1, rel=1e-15)
    return times, *(np.array([level.alpha**2 for level in levels]) for levels in zip(*steps, strict=True))


def test_levels_follow_the_timesteps_or_the_fixed_ratio():
    process = Process(sampler=Sampler(set_alpha_to_one=False, final_sigmas_type="sigma_min"))
    levels = process.alpha_bar
    chosen, before, after = columns(make_schedule(process, "ddim", 7, "linspace"))
    np.testing.assert_allclose(before, levels[chosen], rtol=1e-15)
    np.testing.assert_allclose(after[:-1], levels[chosen[:-1] - 1000 // 7], rtol=1e-15)
    assert after[-1] == pytest.approx(levels[0], rel=1e-15)
    for solver, spacing, final in [("ddim", "stride", levels[0]), ("ddpm", "linspace", 1), ("dpm++", None, levels[0])]:
        chosen, _, after = columns(make_schedule(process, solver, 10, spacing))
        np.testing.assert_allclose(after, [*levels[chosen[1:]], final], rtol=1e-15)


@pytest.mark.parametrize("steps", [0, -1, 1001, 10.0, "10", True, None])
def test_bad_step_counts_are_refused(steps):
    with pytest.raises(UsageError, match="expected an integer from 1 to 1000"):
        timesteps(Process(), "ddpm", steps)


@pytest.mark.parametrize(
    ("solver", "spacing", "steps"), [("dpm++", "linspace", 1000), ("dpm++", "leading", 1000), ("ddim", "leading", 1000)]
)
def test_runs_that_leave_or_repeat_the_training_steps_are_refused(solver, spacing, steps):
    process = Process(sampler=Sampler(steps_offset=1))
    with pytest.raises(UsageError, match="do not fit into 1000 training steps"):
        timesteps(process, solver, steps, spacing)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UsageError, match=r'solver \'dmp\+\+\' is not known \(did you mean "dpm\+\+"\?\)'):
        timesteps(Process(), "dmp++", 10)
    with pytest.raises(UsageError, match='did you mean "leading"'):
        timesteps(Process(), "ddim", 10, "leeding")
