"""Tests of what real pipelines give their transformers, compared with the ports that our rows state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
)

from dit_export.checkpoints.diffusers import read_transformer
from dit_export.networks import Network
from dit_export.networks.diffusers import Call, capture, record, sort
from dit_export.networks.dit import dit_network
from dit_export.networks.families import family_network
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError
from tests.networks import tiny
from tests.networks.tiny import TOKENS
from tests.pixart import small_vae

SIZE = {"height": 64, "width": 64}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(1, *shape)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd3(transformer: Any, **arguments: Any) -> tuple[Port, ...]:
    encoders = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=None, **encoders)
    prompts = {f"{sign}prompt_embeds": normal(TOKENS, 48) for sign in ("", "negative_")}
    pooled = {f"{sign}pooled_prompt_embeds": normal(40) for sign in ("", "negative_")}
    return capture(quiet(pipeline), **prompts, **pooled, **SIZE, **arguments)


def pixart(transformer: Any) -> tuple[Port, ...]:
    scheduler = DPMSolverMultistepScheduler()
    pipeline = PixArtAlphaPipeline(None, None, vae=None, transformer=transformer, scheduler=scheduler)
    prompts = {f"{sign}prompt_embeds": normal(TOKENS, 48) for sign in ("", "negative_")}
    mask = (torch.arange(TOKENS) < 7).long()[None]
    masks = {f"{sign}prompt_attention_mask": mask for sign in ("", "negative_")}
    options = {"negative_prompt": None, "use_resolution_binning": False}
    return capture(quiet(pipeline), **prompts, **masks, **options, **SIZE)


def facts(ports: tuple[Port, ...]) -> list[tuple[object, ...]]:
    """Return what can be seen from outside, in our rows' order; a mask's dtype is the row's choice."""
    order = ("state", "time", "condition")
    seen = [(order.index(port.role), port.dtype, port.shape, bool(port.masks)) for port in ports]
    return sorted(seen, key=lambda row: (row[0], -len(row[2]), row[3]))


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], tuple[Port, ...]]]] = {
    "sd3": (lambda: tiny.sd3(), sd3),
    "sd3.5": (lambda: tiny.sd3(**tiny.SD3_5), sd3),
    "pixart": (lambda: tiny.pixart(), pixart),
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_what_the_pipeline_does(name) -> None:
    make, run = CASES[name]
    transformer = make()
    network = family_network(transformer, tokens=TOKENS)
    assert facts(run(transformer)) == facts(network.ports)
    assert wrapped(network) == run(transformer)


def wrapped(network: Network) -> tuple[Port, ...]:
    """The arguments that our wrapper gives diffusers' module, sorted in the same way."""
    values, others = (tiny.inputs(network, 2, seed=seed) for seed in (0, 1))
    moved = {port.name: others[port.name] for port in (network.state, network.time)}
    return sort(
        *record(network.module.transformer, lambda: [network.module(**given) for given in (values, values | moved)])
    )


def test_dit(tmp_path) -> None:
    transformer = tiny.dit(num_embeds_ada_norm=1000)  # DiTPipeline has the null label 1000 in its code
    ports = capture(quiet(DiTPipeline(transformer, small_vae(), DDIMScheduler())), class_labels=[3])
    assert [port.name for port in ports] == ["hidden_states", "timestep", "class_labels"]
    transformer.save_pretrained(tmp_path)
    assert facts(ports) == facts(dit_network(read_transformer(tmp_path)[0]).ports)


def test_sizes_of_pixart_alpha() -> None:
    """At 1024 px its pipeline says the size: constants here, conditions there."""
    transformer = tiny.pixart(sample_size=128)
    names = [port.name for port in pixart(transformer)]
    assert set(names) - {port.name for port in pixart(tiny.pixart())} == {
        "added_cond_kwargs.resolution",
        "added_cond_kwargs.aspect_ratio",
    }


def call(**inputs: torch.Tensor) -> Call:
    return Call(inputs, inputs["x"])


def test_sorting() -> None:
    x, t, ids = torch.randn(2, 4, 8, 8), torch.ones(1), torch.randn(16, 3)
    mask, tokens = torch.tensor([[1, 1, 0]] * 2), torch.randn(2, 3, 5)
    one = {"x": x, "t": t, "ids": ids, "tokens": tokens, "mask": mask, "hint": torch.randn(2, 4, 8, 8)}
    assert sort(call(**one), call(**one | {"x": x + 1, "t": t + 1})) == (
        Port("x", "state", "float32", (4, 8, 8)),
        Port("t", "time", "float32", ()),
        Port("tokens", "condition", "float32", (3, 5)),
        Port("mask", "condition", "float32", (3,), masks="tokens"),
        Port("hint", "condition", "float32", (4, 8, 8)),  # ids have no rows: a constant
    )
    with pytest.raises(UsageError, match=r"tokens of shape \[2, 3, 5\] changes from step to step"):
        sort(call(**one), call(**one | {"x": x + 1, "t": t + 1, "tokens": tokens + 1}))
    with pytest.raises(UsageError, match=r"no argument: expected one argument .* role 'time'"):
        sort(call(**one), call(**one | {"x": x + 1}))
    with pytest.raises(UsageError, match="called 3 times"):
        sort(*[call(**one)] * 3)
