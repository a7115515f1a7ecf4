"""Guidance policies: diffusers' guiders as the judge, the rows that a run evaluates, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from dit_runtime import EngineError, Pipeline, Request, UsageError
from dit_runtime.sampling.guidance import MIXES, POLICIES, make_policy
from dit_runtime.sampling.noise import Noise
from dit_runtime.warming import made_up
from tests.runtime.test_loops import of_process
from tests.runtime.watched import failing, watch_denoiser

TOLERANCE = 1e-5  # of the norm; diffusers mixes in float32
STEPS = 6
# Ours, and diffusers' guider with the same numbers.
GUIDERS = [
    ("rescale guidance_rescale=0.3", "ClassifierFreeGuidance", {"guidance_rescale": 0.3}),
    ("rescale guidance_rescale=1", "ClassifierFreeGuidance", {"guidance_rescale": 1.0}),
    ("zero_star", "ClassifierFreeZeroStarGuidance", {"zero_init_steps": 1}),
    ("zero_star zero_init_steps=2", "ClassifierFreeZeroStarGuidance", {"zero_init_steps": 2}),
    ("apg eta=0.25", "AdaptiveProjectedGuidance", {"eta": 0.25, "momentum": -0.5, "rescale": 15.0}),
    ("apg momentum=0.7 norm_threshold=2", "AdaptiveProjectedGuidance", {"eta": 0.0, "momentum": 0.7, "rescale": 2.0}),
]


def guider(name: str, numbers: dict, weight: float, **interval: float):
    from diffusers import guiders

    names = {key: f"adaptive_projected_guidance_{key}" for key in ("momentum", "rescale")}
    numbers = {names.get(key, key): value for key, value in numbers.items()}
    if name == "AdaptiveProjectedGuidance":  # in the paper's form, w - 1 leads away from the own prediction
        return guiders.AdaptiveProjectedGuidance(weight - 1, use_original_formulation=True, **numbers, **interval)
    return getattr(guiders, name)(weight, **numbers, **interval)


def mixed(guider, step: int, steps: int, own: np.ndarray, away: np.ndarray) -> np.ndarray:
    import torch

    guider.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(0))
    if step == 0 and getattr(guider, "adaptive_projected_guidance_momentum", None) is not None:
        from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

        guider.momentum_buffer = MomentumBuffer(guider.adaptive_projected_guidance_momentum)
    return guider.forward(torch.from_numpy(own), torch.from_numpy(away)).pred.numpy()


def far(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


@pytest.mark.parametrize(("words", "name", "numbers"), GUIDERS)
@pytest.mark.parametrize("weight", [1.5, 6.0])
def test_a_policy_mixes_as_diffusers_does(words, name, numbers, weight) -> None:
    """Steps in their order, for momentum; the first ones of zero_star evaluate nothing and are the runs' below."""
    policy, judge = make_policy(words), guider(name, numbers, weight)
    zeros = numbers.get("zero_init_steps", 0)
    for step in range(4):
        own, away = np.split(Noise(step).normal((6, 4, 5, 3)), 2)
        expected = mixed(judge, step, 4, own, away)
        got = policy.mix(np.concatenate([own, away]), np.full(3, weight), channels=4)
        linear = own + (weight - 1) * (own - away)
        if step >= zeros:
            assert far(got, expected) <= TOLERANCE < 0.005 < far(linear, expected)


@pytest.mark.parametrize("name", MIXES)
def test_each_sample_is_mixed_alone(name) -> None:
    """Each has its own weight; 1 is the own prediction to the bit, and so are unguided channels."""
    own, away = np.split(Noise(1).normal((6, 4, 5, 3)), 2)
    own[0] = 2.0  # without a deviation, which rescaling divides by
    weights = np.array([1.0, 2.0, 5.0])
    together = make_policy(name).mix(np.concatenate([own, away]), weights, channels=3)
    assert np.array_equal(together[0], own[0]) and np.array_equal(together[:, 3:], own[:, 3:])
    for row in (1, 2):
        alone = make_policy(name).mix(np.stack([own[row], away[row]]), weights[row : row + 1], channels=3)
        assert np.array_equal(alone[0], together[row]) and far(together[row, :3], own[row, :3]) > 0.01


@pytest.fixture
def flow(bundle):
    with Pipeline.load(of_process(bundle, "velocity", "euler"), threads=1) as pipe:
        yield pipe


def stepped(pipe: Pipeline, judge, labels: list[int], weight: float) -> np.ndarray:
    """Euler's method with diffusers' guider around the two predictions, from seed 3; σ falls evenly from 1."""
    x = Noise(3).normal((len(labels), *pipe.manifest.state.shape)).astype(np.float64)
    times = 1 - np.arange(STEPS) / STEPS
    ones = np.ones(len(labels), np.float32)
    rows = [{"labels": np.array(labels)}, {"labels": np.full(len(labels), 5)}]
    inputs = [pipe.engines.inputs(times, own, None, ones) for own in rows]
    for step in range(STEPS):
        predictions = [pipe.engines.denoise(x, group, step)[0] for group in inputs]
        x = x - mixed(judge, step, STEPS, *predictions).astype(np.float64) / STEPS
    return x


@pytest.mark.parametrize(("words", "name", "numbers"), [(None, "ClassifierFreeGuidance", {}), *GUIDERS])
@pytest.mark.parametrize("interval", [None, (0.3, 0.7)])
def test_a_run_is_diffusers_loop(flow, words, name, numbers, interval) -> None:
    """σ of the six steps is 1, 5/6, 4/6 …: from 0.3 to 0.7 steps 2 to 4 are guided, diffusers' 1/3 to 5/6."""
    # int(fraction · 6) is the step, so each is a little above its fraction.
    fractions = {} if interval is None else {"start": 2.01 / STEPS, "stop": 5.01 / STEPS}
    fields = {"steps": STEPS, "guidance": 3.0, "seed": 3, "guidance_policy": words, "output": "latents"}
    run = flow.run(Request([1, 4], guidance_interval=interval, **fields))
    got = run.result()
    assert far(got, stepped(flow, guider(name, numbers, 3.0, **fractions), [1, 4], 3.0)) <= TOLERANCE
    other = (0.3, 0.6) if interval is None else None
    assert far(got, flow.sample([1, 4], guidance_interval=other, **fields)) > 1e-3
    guided = STEPS if interval is None else 3
    zeros = numbers.get("zero_init_steps", 0)
    own = max(0, (0 if interval is None else 2) - zeros) + (0 if interval is None else 1)
    assert run.rows == run.planned_rows == own + 2 * (guided - (zeros if interval is None else 0))


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++"])
def test_an_interval_over_everything_is_no_interval(opened, solver) -> None:
    """To the bit, with the policy's name too; and one over nothing is guidance 1."""
    pipe = opened("labels")
    fields = {"steps": STEPS, "solver": solver, "seed": 2, "spacing": "respaced", "output": "latents"}
    plain = pipe.sample([1, 4], guidance=3.0, **fields)
    assert np.array_equal(pipe.sample([1, 4], guidance=3.0, guidance_interval=(0, 1), **fields), plain)
    assert np.array_equal(pipe.sample([1, 4], guidance=3.0, guidance_policy="constant", **fields), plain)
    unguided = pipe.sample([1, 4], guidance=1.0, **fields)
    run = pipe.run(Request([1, 4], guidance=3.0, guidance_interval=[0.5, 0.55], **fields))
    assert np.array_equal(run.result(), unguided) and run.rows == STEPS and far(plain, unguided) > 0.01


def test_a_sample_does_not_depend_on_its_batch(opened) -> None:
    """The engine gives its rows other last bits in another batch (1e-6); a neighbour's weight is off by 1e-2."""
    pipe = opened("labels")
    fields = {"steps": STEPS, "solver": "ddpm", "output": "latents", "guidance_interval": (0.2, 0.9)}
    for name in MIXES:
        together = pipe.sample([3, 1, 2, 4], guidance=[1, 4, 2, 3], seed=[5, 6, 7, 8], guidance_policy=name, **fields)
        for row, (label, weight) in enumerate([(3, 1.0), (1, 4.0), (2, 2.0), (4, 3.0)]):
            alone = pipe.sample([label], guidance=weight, seed=[5 + row], guidance_policy=name, **fields)
            assert far(alone[0], together[row]) <= 2e-5


def test_a_step_that_failed_can_be_tried_again(opened) -> None:
    """Momentum is taken once: two samples, apart, are two calls of the engine, and the second one fails."""
    pipe = opened("labels")
    request = Request([1, 2], steps=4, guidance=3.0, guidance_policy="apg", seed=3, output="latents")
    run = watch_denoiser(pipe, failing(4)).run(request)
    assert run.step()
    with pytest.raises(EngineError, match="out of memory"):
        run.step()
    assert (run.done, run.rows) == (1, 2) and np.array_equal(run.result(), pipe.run(request).result())


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("labels", {"guidance_policy": "agp"}, r"'agp' is not known .did you mean .apg.*constant, rescale"),
        ("labels", {"guidance_policy": "apg share=1"}, "apg has no 'share'; it takes eta, momentum, norm_threshold"),
        ("labels", {"guidance_policy": "constant eta=1"}, "constant has no 'eta'; it takes no numbers"),
        ("labels", {"guidance_policy": "apg eta=x"}, "eta is 'x'; expected a number"),
        ("labels", {"guidance_policy": "rescale guidance_rescale=2"}, "is '2'; expected a number from 0 to 1"),
        ("labels", {"guidance_policy": "zero_star zero_init_steps=0.5"}, "is '0.5'; expected an integer from 0"),
        ("labels", {"guidance_policy": 5}, "guidance_policy '5' is not known"),
        ("labels", {"guidance_policy": " "}, "guidance_policy '' is not known"),
        ("labels", {"guidance_policy": "zero_star zero_init_steps=1"}, "needs a model that predicts a velocity"),
        ("labels", {"guidance_interval": (0.7, 0.2)}, r"guidance_interval is \(0.7, 0.2\); expected two fractions"),
        ("labels", {"guidance_interval": (0.2, 1.2)}, "expected two fractions"),
        ("labels", {"guidance_interval": 0.5}, "guidance_interval is 0.5; expected two"),
        ("labels", {"guidance_interval": (0.2, np.nan)}, "expected two fractions"),
        ("embedded", {"guidance_policy": "apg"}, "guidance_policy is 'apg', but this bundle takes its guidance as"),
        ("embedded", {"guidance_interval": (0.2, 0.7)}, r"guidance_interval is \(0.2, 0.7\), but this bundle takes"),
        ("free", {"guidance_policy": "rescale"}, "but this bundle has no guidance"),
    ],
)
def test_what_is_refused(opened, kind, fields, words) -> None:
    contract = opened(kind).manifest
    with pytest.raises(UsageError, match=words):
        Request(condition=made_up(contract, 1), output="latents", **fields).check(contract)


def test_facts_and_code_have_the_same_policies() -> None:
    assert {"constant", *MIXES} == set(POLICIES)
