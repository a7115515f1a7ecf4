"""Lumina-Image 2.0 from a whole pipeline of diffusers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline
from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift
from torch import Tensor

from dit_export.checkpoints import load
from dit_export.networks.families import family_network
from dit_export.recipe import Recipe
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from tests.families import tiny as families
from tests.families.elsewhere import Elsewhere
from tests.networks import tiny

TOKENS, SIZE = 20, (8, 12)
CAPTION, SIDE = 256, 8  # a byte is a token, and the system's prompt has 164


def gemma(tokenizer: Any) -> Any:
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tiny.randomize(transformers.Gemma2Model(config))


def make_pipeline(**scheduler: Any) -> Lumina2Pipeline:
    tokenizer = families.byte_tokenizer(bos="<bos>", eos="", pad="<pad>")
    transformer = tiny.lumina2()
    with torch.no_grad():
        for block in transformer.layers:
            block.attn.norm_k.weight *= 3  # attention that looks at few tokens of the prompt, not at all equally
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 6.0} | scheduler),
        vae=families.vae(),
        text_encoder=gemma(tokenizer),
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> families.Case:
    pipeline, folder = make_pipeline(), tmp_path_factory.mktemp("lumina2")
    with one_thread():
        bundle = families.build(pipeline, folder, caption_tokens=CAPTION, resolution=8 * SIDE)
    call = {"height": 8 * SIDE, "width": 8 * SIDE, "max_sequence_length": CAPTION}
    return families.Case(pipeline, bundle, call)


@pytest.mark.slow
def test_a_prompt_is_diffusers(case) -> None:
    families.accept(case)


class TestElsewhere(Elsewhere):
    """On OpenVINO, without PyTorch, in C++."""


@pytest.mark.slow
def test_what_leaves_the_loop(case) -> None:
    """Each block's modulation leaves, 4 vectors, that of the refined image too, and 1 at the end."""
    contract = manifest.read(case.bundle)
    timed = [tensor for stage in contract.stages if stage.runs.startswith("time") for tensor in stage.gives]
    assert [tensor.shape for tensor in timed] == [("rows", 4 * (2 + 1) + 1, 96)]


def theirs(transformer: torch.nn.Module, values: dict[str, Tensor]) -> Tensor:
    """Return dx/dσ as the pipeline makes it of the transformer's own forward."""
    return -transformer(
        hidden_states=values["latents"],
        timestep=1 - values["timesteps"],
        encoder_hidden_states=values["captions"],
        encoder_attention_mask=values["mask"].long(),
    ).sample


def with_lengths(values: dict[str, Tensor], lengths: list[int]) -> dict[str, Tensor]:
    tokens = values["mask"].shape[1]
    return values | {"mask": (torch.arange(tokens) < torch.tensor(lengths)[:, None]).float()}


@pytest.mark.parametrize("lengths", [[20, 20, 20, 20], [1, 7, 19, 20], [5, 5, 5, 5]])
def test_a_wrapper_is_diffusers(lengths) -> None:
    """Prompts of all lengths in one batch, though diffusers' own forward cuts each to its length."""
    transformer = tiny.lumina2()
    network = family_network(transformer, SIZE, TOKENS)
    values = with_lengths(tiny.inputs(network, 4), lengths)
    got, expected = tiny.run(network, values), theirs(transformer, values)
    # Diffusers rotates in double precision.
    assert max(tiny.distance(*rows) for rows in zip(got, expected, strict=True)) <= 2e-6
    others = tiny.inputs(network, 4, seed=1)
    for port in network.ports:
        changed = tiny.run(network, values | {port.name: others[port.name]})
        assert tiny.distance(changed, expected) > 0.01, port.name


def test_neighbours_change_nothing() -> None:
    network = family_network(tiny.lumina2(), SIZE, TOKENS)
    values = with_lengths(tiny.inputs(network, 3), [4, 20, 11])
    together = tiny.run(network, values)
    for row in range(3):
        alone = tiny.run(network, {name: value[row : row + 1] for name, value in values.items()})
        assert tiny.distance(together[row : row + 1], alone) <= 1e-6
    beyond = values["captions"] + 9 * (1 - values["mask"])[..., None]  # what a prompt does not have
    assert tiny.distance(tiny.run(network, values | {"captions": beyond}), together) <= 1e-6


def test_a_dynamic_shift_counts_channels(tmp_path) -> None:
    """The pipeline takes the second axis of its latents for their tokens."""
    make_pipeline(use_dynamic_shifting=True).save_pretrained(tmp_path)
    process = load(Recipe(checkpoint=str(tmp_path), latents_only=True, without_text_encoders=True)).process
    assert process.shift == pytest.approx(math.exp(calculate_shift(16)))
    assert process.sampler.steps == 30 and process.sampler.flow_spacing == "trailing"


def test_what_its_position_tables_hold() -> None:
    family_network(tiny.lumina2(), (32, 32), 299)
    with pytest.raises(UsageError, match="captions of 300 tokens; the position table has room for 299"):
        family_network(tiny.lumina2(), SIZE, 300)
    with pytest.raises(UsageError, match="an image of 4 x 17 tokens; the position tables have room for 16 x 16"):
        family_network(tiny.lumina2(), (8, 34), TOKENS)
