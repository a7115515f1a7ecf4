import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from dit_runtime.errors import UsageError
from dit_runtime.sampling.process import Process, Sampler
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
