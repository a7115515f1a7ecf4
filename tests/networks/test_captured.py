"""Tests of what short runs of a pipeline show: arguments by role, and what is refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler

from dit_export.checkpoints.pipelines import condition_arrays, fit_process, run
from dit_export.networks import Network
from dit_export.networks.caller import Caller, network
from dit_export.networks.captured import Captured
from dit_export.networks.strides import find_places, strides
from dit_export.recipe import Recipe
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError
from tests.networks.toy import CHANNELS, SIDE, TOKENS, WIDTH, ToyPipeline, pack


def capture(pipeline: ToyPipeline) -> tuple[Captured, Network]:
    captured = Captured(pipeline.transformer, run(pipeline, Recipe()))
    return captured, network(captured, fit_process(pipeline, captured), 5.0)


PORTS = (
    Port("x", "state", "float32", (CHANNELS, SIDE, SIDE)),
    Port("t", "time", "float32", ()),
    Port("caption", "condition", "float32", (TOKENS, WIDTH)),
    Port("mask", "condition", "float32", (TOKENS,), masks="caption"),
)
HABITS = {
    "a batch": {},
    "a swapped batch": {"guidance": "swapped"},
    "two calls": {"guidance": "calls"},
    "another sign": {"sign": -1.0},
    "sigma": {"times": "sigma"},
    "the other direction": {"times": "inverse"},
    "packed": {"packed": True},
}


@pytest.mark.parametrize("habit", HABITS)
def test_a_network_repeats_its_pipeline(habit: str) -> None:
    """The ports are the same whatever the pipeline does around its transformer."""
    captured, made = capture(ToyPipeline(**HABITS[habit]))
    assert made.ports == PORTS and made.rule is None and made.guidance_port == ""
    assert captured.sorted.weight == ""


def test_what_is_repeated() -> None:
    """The prediction of a state of our own is the pipeline's at that state, in the order of the noise."""
    pipeline = ToyPipeline(packed=True, sign=-1.0)
    _, made = capture(pipeline)
    x, caption, mask = torch.randn(3, *made.state.shape), torch.randn(3, TOKENS, WIDTH), torch.ones(3, TOKENS)
    got = made.module(x=x, t=torch.full((3,), 0.5), caption=caption, mask=mask)
    output = pipeline.predict(pack(x), torch.tensor(500.0), caption, mask, 1.0, False)
    expected = output.unflatten(1, (2, 2)).unflatten(3, (CHANNELS, 2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_embedded_guidance() -> None:
    _, made = capture(ToyPipeline(guidance="embedded"))
    assert made.ports == (*PORTS, Port("guidance_scale", "condition", "float32", ()))
    assert made.guidance_port == "guidance_scale" and made.module.factor == pytest.approx(0.1)


def test_the_recorded_conditions() -> None:
    captured, _ = capture(ToyPipeline())
    arrays = condition_arrays(captured)
    assert {name: rows["mask"].sum(axis=1).tolist() for name, rows in arrays.items()} == {
        "conditions": [5, 9],  # words of both prompts
        "negative": [1],
    }
    np.testing.assert_array_equal(arrays["conditions"]["caption"].shape, (2, TOKENS, WIDTH))


REFUSED = {
    "t of shape [1, 16] changes from step to step and is a time of its own for each token": {"times": "tokens"},
    "t is float of Python and changes from step to step": {"times": "number"},
    "x.0: a tensor in a list": {"lists": True},
    "caption has the shape [1, 5, 8] for one prompt and [1, 9, 8] for another: a data-dependent length": {
        "longest": True,
        "guidance": "embedded",
    },
    "unknown guidance: what the scheduler takes at a weight of 5 is neither the linear": {"guidance": "squared"},
    "class 'EulerAncestralDiscreteScheduler' is not supported": {"scheduler": EulerAncestralDiscreteScheduler()},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str) -> None:
    with pytest.raises(UsageError) as error:
        capture(ToyPipeline(**REFUSED[message]))
    assert message in str(error.value)


class Three(ToyPipeline):
    """Guidance away from a third prediction."""

    def predict(self, x, time, caption, mask, weight, guided):
        if guided:
            self.transformer(x, time.expand(len(x)), caption[: len(x)], mask[: len(x)])
        return super().predict(x, time, caption, mask, weight, guided)


class Restless(ToyPipeline):
    """A caption that fades from step to step."""

    def predict(self, x, time, caption, mask, weight, guided):
        return super().predict(x, time, caption * (1 + time / 1000), mask, weight, guided)


class Both(ToyPipeline):
    """A weight of guidance that the network reads while it mixes two predictions."""

    def predict(self, x, time, caption, mask, weight, guided):
        self.guidance, mixes = "embedded", guided
        output = [
            super(Both, self).predict(x, time, caption[part], mask[part], weight, False)
            for part in (slice(len(x)), slice(-len(x), None))
        ]
        self.guidance = "batch"
        return output[0] + weight * (output[1] - output[0]) if mixes else output[1]


class Forgetful(ToyPipeline):
    """A constant that the batch's second sample does not share."""

    def predict(self, x, time, caption, mask, weight, guided):
        self.transformer.inner.bias.fill_(float(len(x)))
        return super().predict(x, time, caption, mask, weight, guided)


class OwnSteps(ToyPipeline):
    """A scheduler that is given σ of the pipeline's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        once = self.scheduler.set_timesteps
        self.scheduler.set_timesteps = lambda count: once(sigmas=[(1 - step / count) ** 2 for step in range(count)])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Three, "unknown guidance: the transformer predicts 3 times for each sample and step"),
        (Restless, "caption of shape [1, 12, 8] changes from step to step and is neither the state nor a time"),
        (Both, "unknown guidance: weight changes with the weight of guidance, which mixes two predictions besides"),
        (Forgetful, "step 1 of 2 of seeds (0, 1) is not repeated by the arguments as they were sorted"),
        (OwnSteps, "no schedule that is known repeats the pipeline's steps"),
    ],
)
def test_more_refusals(kind: type[ToyPipeline], message: str) -> None:
    with pytest.raises(UsageError) as error:
        capture(kind())
    assert message in str(error.value)


def test_whole_times_are_rounded() -> None:
    """As 0.251 in float32 times 1000, which is less than 251."""
    caller = SimpleNamespace(values={"t": torch.tensor([0])}, state_argument="x", times={"t": (1000.0, 0.0)}, time="t")
    times = torch.arange(1000) / 1000
    assert Caller.argument(caller, "t", 0, {"t": times}).tolist() == [*range(1000)]


def test_a_call_that_needs_more() -> None:
    class Image(ToyPipeline):
        def __call__(self, prompt, image, **options):
            return super().__call__(prompt, **options)

    with pytest.raises(UsageError, match="Image: its call needs image; expected a prompt alone"):
        capture(Image())
    with pytest.raises(UsageError, match="ToyPipeline: its call has no height"):
        run(ToyPipeline(), Recipe(resolution=64))


VIEWS = {
    "transposed": lambda x: x.flatten(2).transpose(1, 2),
    "packed": pack,
    "the second half": lambda x: x.chunk(2, 1)[1],
    "a part of two axes": lambda x: x[:, 1:4, 2:],
    "every second one": lambda x: x[..., 1::2],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_found(name: str) -> None:
    view, rows = VIEWS[name], torch.randn(2, 6, 8, 4)
    places = find_places(view(rows).flatten(1).numpy(), rows.flatten(1).numpy())
    assert places is not None
    recovered = strides(places, (6, 8, 4), tuple(view(rows).shape[1:]))
    other = torch.randn(3, 6, 8, 4)
    assert recovered is not None and torch.equal(recovered(other), view(other))


def test_what_is_no_view() -> None:
    rows = torch.randn(2, 64)
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(64))
    places = find_places(rows[:, shuffled].numpy(), rows.numpy())
    assert places is not None and strides(places, (64,), (64,)) is None
    assert find_places((rows + 1e-6).numpy(), rows.numpy()) is None  # another value
    assert find_places(rows.numpy(), torch.cat([rows, rows[:, :1]], 1).numpy()) is None  # two places for one
