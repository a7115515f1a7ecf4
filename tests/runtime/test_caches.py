"""Output caches: diffusers' TaylorSeer and EasyCache's authors as judges, the rows that they save, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from dit_runtime import EngineError, Pipeline, Request, UsageError
from dit_runtime.sampling.caches import CACHES, KINDS
from dit_runtime.sampling.noise import Noise
from dit_runtime.sampling.solvers import plan, solve
from tests.runtime.test_loops import of_process
from tests.runtime.watched import failing, watch_denoiser

TOLERANCE = 1e-5  # of the norm; the judges count in float32
STEPS = 12


@pytest.fixture
def flow(bundle):
    with Pipeline.load(of_process(bundle, "velocity", "euler"), threads=1) as pipe:
        yield pipe


def far(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


def evaluate(pipe: Pipeline, labels: list[int], guidance: float = 3.0, steps: int = STEPS):
    """Return the network of a run of Euler's method: (state, step) -> guided prediction, float32."""
    times = plan(pipe.manifest.process, "euler", steps)
    weights = np.full(len(labels), guidance, np.float32)
    own, away = {"labels": np.array(labels)}, {"labels": np.array([5])}
    inputs = pipe.engines.inputs(times, own, None if guidance == 1 else away, weights)
    return lambda x, step: pipe.engines.denoise(x, inputs, step)[0]


def finish(pipe: Pipeline, network, count: int, steps: int = STEPS) -> np.ndarray:
    """Solve from seed 3 with a network (state, step) -> prediction."""
    noise = Noise(3).normal((count, *pipe.manifest.state.shape))
    run = solve(pipe.manifest.process, "euler", steps, noise, lambda shape: np.zeros(shape))
    x, _ = next(run)
    for step in range(steps):
        try:
            x, _ = run.send((network(x, step), None))
        except StopIteration as end:
            return end.value
    raise AssertionError("a run of more steps")


def hooked(network, **settings):
    """Return the network with diffusers' hook around it, and the steps at which it was evaluated."""
    import torch
    from diffusers import TaylorSeerCacheConfig
    from diffusers.hooks.hooks import CacheContext, _set_cache_context
    from diffusers.hooks.taylorseer_cache import apply_taylorseer_cache

    class Output(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            computed.append(step)
            return torch.from_numpy(network(x.numpy(), step))

    computed: list[int] = []
    step, module = 0, torch.nn.Module()
    module.output = Output()
    config = TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, cache_identifiers=["output"], **settings)
    apply_taylorseer_cache(module, config)
    _set_cache_context(module, CacheContext("run"))

    def predict(x: np.ndarray, now: int) -> np.ndarray:
        nonlocal step
        step = now
        return module.output(torch.from_numpy(x)).numpy()

    return predict, computed


@pytest.mark.parametrize(("order", "interval", "before", "after"), [(0, 3, 2, 11), (1, 2, 3, 10), (2, 4, 4, None)])
def test_taylorseer_is_diffusers(flow, order, interval, before, after) -> None:
    settings = {"cache_interval": interval, "max_order": order, "disable_cache_before_step": before}
    predict, computed = hooked(evaluate(flow, [1, 4]), disable_cache_after_step=after, **settings)
    expected = finish(flow, predict, 2)
    fields = settings | {"disable_cache_after_step": STEPS if after is None else after, "steps": STEPS, "seed": 3}
    run = flow.run(Request([1, 4], guidance=3.0, cache="taylorseer", output="latents", **fields))
    assert run.planned_rows == 2 * len(computed) < 2 * STEPS
    got, asked = [], []
    while run.done < run.steps:
        asked += [run.done] * (run.ask() is not None)
        run.step()
        got.append(run.state)
    assert asked == computed and run.rows == run.planned_rows
    assert far(got[-1], expected) <= TOLERANCE
    for other in ({"max_order": 2 - order}, {"cache_interval": interval + 1}):
        if other != {"max_order": order}:
            changed = flow.sample([1, 4], guidance=3.0, cache="taylorseer", output="latents", **fields | other)
            assert far(changed, expected) > 100 * TOLERANCE


def authors(network, threshold: float, before: int, computed: list[int]):
    """EasyCache as its authors' program decides for the conditional pass, in float32."""
    state: dict[str, np.ndarray | float | None] = dict.fromkeys(("input", "output", "first", "rate", "change"))
    total = 0.0

    def predict(x: np.ndarray, step: int) -> np.ndarray:
        nonlocal total
        x = x.astype(np.float32)
        skipped = False
        if step < before or step >= STEPS - 1:
            total = 0.0
        elif state["input"] is not None and state["rate"] is not None:
            total += state["rate"] * np.abs(x - state["input"]).mean() / np.abs(state["output"]).mean()
            skipped = total < threshold
            total = total if skipped else 0.0
        state["input"] = x
        if skipped:
            return x + state["change"]
        computed.append(step)
        output = network(x, step)
        if state["output"] is not None:
            state["rate"] = np.abs(output - state["output"]).mean() / np.abs(x - state["first"]).mean()
        state.update(first=x, output=output, change=output - x)
        return output

    return predict


@pytest.mark.parametrize(("threshold", "before"), [(0.1, 2), (0.3, 3)])
def test_easycache_is_its_authors(flow, threshold, before) -> None:
    computed: list[int] = []
    expected = finish(flow, authors(evaluate(flow, [1, 4]), threshold, before, computed), 2)
    fields = {"cache": "easycache", "cache_threshold": threshold, "disable_cache_before_step": before, "steps": STEPS}
    run = flow.run(Request([1, 4], guidance=3.0, seed=3, output="latents", **fields))
    assert run.planned_rows is None
    asked = []
    while run.done < run.steps:
        asked += [run.done] * (run.ask() is not None)
        run.step()
    assert asked == computed and before + 1 < len(computed) < STEPS - 2 and run.rows == 2 * len(computed)
    assert far(run.result(), expected) <= TOLERANCE


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++"])
@pytest.mark.parametrize(
    "cache",
    [{"cache": "taylorseer", "cache_interval": 1}, {"cache": "easycache", "cache_threshold": 0.0}],
)
def test_a_cache_of_nothing_is_the_plain_run(opened, solver, cache) -> None:
    fields = {"steps": 8, "solver": solver, "seed": 2, "guidance": 3.0, "spacing": "respaced", "output": "latents"}
    pipe = opened("labels")
    plain = pipe.sample([1, 4], **fields)
    run = pipe.run(Request([1, 4], **fields, **cache))
    assert np.array_equal(run.result(), plain) and run.rows == 16
    used = pipe.sample([1, 4], **fields, cache="taylorseer")  # a learned variance is the last one
    assert np.isfinite(used).all() and far(used, plain) > 1e-4


def test_a_cache_starts_anew_where_guidance_changes(flow) -> None:
    """Guided from step 3 to 8: these two are computed, whatever the interval; no history crosses them."""
    fields = {"steps": STEPS, "guidance": 3.0, "seed": 3, "guidance_interval": (0.26, 0.76), "output": "latents"}
    settings = {"cache_interval": 20, "max_order": 0, "disable_cache_before_step": 0, "disable_cache_after_step": -1}
    computed, own, both = [], evaluate(flow, [1], 1.0), evaluate(flow, [1])
    held = None

    def predict(x: np.ndarray, step: int) -> np.ndarray:
        nonlocal held
        if step in (0, 1, 3, 9, 11):  # of diffusers' schedule 1, then each that begins or ends
            computed.append(step)
            held = (both if 3 <= step < 9 else own)(x, step)
        return held

    expected = finish(flow, predict, 1)
    run = flow.run(Request([1], cache="taylorseer", **fields, **settings))
    assert np.array_equal(run.result(), expected.astype(np.float32))
    assert run.rows == run.planned_rows == 1 + 1 + 2 + 1 + 1


def test_a_policy_and_a_cache(flow) -> None:
    """The cache holds what the policy made; a step of prediction 0 is no history."""
    fields = {"steps": STEPS, "guidance": 3.0, "seed": 3, "guidance_policy": "zero_star", "output": "latents"}
    run = flow.run(Request([1], cache="taylorseer", cache_interval=3, **fields))
    run.result()
    computed = [1, 2, 4, 7, 10, 11]
    assert run.rows == run.planned_rows == 2 * len(computed)
    plain = flow.run(Request([1], **fields))
    assert 1e-4 < far(run.result(), plain.result()) < 0.5 and plain.rows == 2 * (STEPS - 1)


@pytest.mark.parametrize("cache", [{"cache": "taylorseer"}, {"cache": "easycache", "cache_threshold": 0.3}])
def test_a_step_that_failed_can_be_tried_again(flow, cache) -> None:
    request = Request([1], steps=STEPS, guidance=3.0, seed=3, output="latents", **cache)
    run, failed = watch_denoiser(flow, failing(6)).run(request), 0
    while run.done < run.steps:
        try:
            run.step()
        except EngineError:
            failed += 1
    assert failed == 1 and np.array_equal(run.result(), flow.run(request).result())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cache": "taylor"}, "cache 'taylor' is not known .did you mean .taylorseer"),
        ({"cache": ["taylorseer"]}, "is not known"),
        ({"max_order": 1}, "got max_order without a cache; known: taylorseer, easycache"),
        ({"cache": "easycache", "max_order": 1}, "cache easycache has no max_order; it takes cache_threshold"),
        ({"cache": "taylorseer", "max_order": 3}, "max_order is 3; expected an integer from 0 to 2"),
        ({"cache": "taylorseer", "cache_interval": 0}, "cache_interval is 0; expected an integer of 1 or more"),
        ({"cache": "taylorseer", "cache_interval": 2.5}, "cache_interval is 2.5; expected an integer"),
        ({"cache": "taylorseer", "disable_cache_before_step": -1}, "expected an integer of 0 or more"),
        ({"cache": "easycache", "cache_threshold": np.nan}, "cache_threshold is nan; expected a number of 0 or more"),
        ({"cache": "taylorseer", "solver": "heun"}, "cache is 'taylorseer' with a solver of 2 evaluations a step"),
    ],
)
def test_what_is_refused(flow, fields, words) -> None:
    with pytest.raises(UsageError, match=words):
        Request([1], output="latents", **fields).check(flow.manifest)


def test_facts_and_code_have_the_same_caches() -> None:
    assert set(KINDS) == set(CACHES)
