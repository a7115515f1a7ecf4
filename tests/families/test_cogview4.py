"""CogView4 from a whole pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusers import CogView4Pipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from numpy.typing import NDArray

from dit_export.checkpoints.scheduler import read_scheduler_config
from dit_export.networks.families import family_network
from dit_export.networks.families.cogview4 import COGVIEW4, mu
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from dit_runtime.sampling.schedule import flow_times, sigmas
from tests.families import tiny as families
from tests.families.elsewhere import Elsewhere
from tests.families.test_lumina2 import with_lengths
from tests.networks import tiny

pytestmark = pytest.mark.slow  # its schedule is in tests/runtime and its network in tests/networks

BLOCKS, CAPTION, SIZE = 2, 64, {"height": 64, "width": 96}  # a byte is a token
SCHEDULE = {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.25, "max_shift": 0.75}


def glm(tokenizer: Any) -> Any:
    config = transformers.GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tiny.randomize(transformers.GlmModel(config))


def make_pipeline() -> CogView4Pipeline:
    tokenizer = families.byte_tokenizer(bos="[gMASK]", pad="<|endoftext|>", padding_side="left")
    return CogView4Pipeline(
        transformer=tiny.cogview4(in_channels=16, out_channels=16, num_layers=BLOCKS),
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULE),
        vae=families.vae(shift_factor=0.0),
        text_encoder=glm(tokenizer),
        tokenizer=tokenizer,
    )


class Case(families.Case):
    """The pipeline fills prompts up to the longest of a call, and they read what fills them up: each has its own."""

    def theirs(
        self, prompts: Sequence[str] = (families.PROMPT,), seed: int = families.SEED, **options: Any
    ) -> NDArray[np.float32]:
        calls = [super(Case, self).theirs((prompt,), seed + row, **options) for row, prompt in enumerate(prompts)]
        return np.concatenate(calls)


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> Case:
    pipeline = make_pipeline()
    with one_thread():
        folder = tmp_path_factory.mktemp("cogview4")
        bundle = families.build(pipeline, folder, caption_tokens=CAPTION, resolution="64x96")
    return Case(pipeline, bundle, SIZE | {"max_sequence_length": CAPTION})


def test_a_prompt_is_diffusers(case) -> None:
    families.accept(case)


def test_more_steps_are_diffusers(case) -> None:
    """6 intervals do not divide 999 training steps: their ends are rounded down."""
    expected = case.theirs(steps=7)
    assert min(families.distances(case.ours(steps=7), expected)) >= families.SAME
    assert max(families.distances(case.ours(steps=7, spacing="linspace"), expected)) < families.ANOTHER


def test_prompts_of_one_length_in_one_call(case) -> None:
    """The pipeline fills both up to 32 tokens: 16 of the prompt, one before them, and padding."""
    prompts = ("a map of a river", "two boats at sea")
    expected = families.Case.theirs(case, prompts)
    assert min(families.distances(case.ours(prompts), expected)) >= families.SAME


class TestElsewhere(Elsewhere):
    """On OpenVINO, without PyTorch, in C++."""


def test_what_leaves_the_loop(case) -> None:
    """Each block's modulation leaves, 6 vectors a stream, 2 of the last block's text stream, and 2 at the end."""
    contract = manifest.read(case.bundle)
    assert (contract.guidance.default, contract.process.sampler.steps) == (5.0, 50)
    timed = [tensor for stage in contract.stages if stage.runs.startswith("time") for tensor in stage.gives]
    assert [tensor.shape for tensor in timed] == [("rows", 12 * BLOCKS - 2, 64)]


@pytest.mark.parametrize("lengths", [[64, 64, 64, 64], [16, 32, 48, 64]])
def test_a_wrapper_is_diffusers(lengths) -> None:
    """Prompts of all lengths in one batch, each as the transformer alone has it without a mask."""
    transformer, size = tiny.cogview4(), (8, 12)
    reference, network = tiny.cogview4(), family_network(transformer, size, CAPTION)
    values = with_lengths(tiny.inputs(network, 4), lengths)
    got, sides = tiny.run(network, values), torch.tensor([[64.0, 96.0]])
    for row, length in enumerate(lengths):
        one = {name: value[row : row + 1] for name, value in values.items()}
        with torch.no_grad():
            expected = reference(
                one["latents"], one["captions"][:, :length], 1000 * one["timesteps"], sides, sides, 0 * sides
            ).sample
        assert tiny.distance(got[row : row + 1], expected) <= 2e-6
    others = tiny.inputs(network, 4, seed=1)
    for port in network.ports:
        if port.name != "mask" or len(set(lengths)) > 1:
            changed = tiny.run(network, values | {port.name: others[port.name]})
            assert tiny.distance(changed, got) > 0.01, port.name


@pytest.mark.parametrize("side", [64, 1024, 2048])
def test_a_schedule_is_diffusers(side) -> None:
    """The pipeline shifts σ, and passes times as they were before."""
    tokens, scheduler = (side // 16) ** 2, FlowMatchEulerDiscreteScheduler(**SCHEDULE)
    process = read_scheduler_config(COGVIEW4.scheduler({}), tokens=tokens, spacing=COGVIEW4.flow_spacing, mu=mu)
    for steps in (1, 4, 7, 50, 1000):
        times = np.linspace(1000, 1, steps).astype(np.int64).astype(np.float32)
        shift = calculate_shift(tokens, scheduler.config.base_image_seq_len, 0.25, 0.75)
        scheduler.set_timesteps(sigmas=times / 1000, mu=shift, timesteps=times)
        np.testing.assert_allclose(sigmas(process, "euler", steps), scheduler.sigmas, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(np.rint(1000 * flow_times(process, "euler", steps)[:-1]), scheduler.timesteps)


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="captions of 40 tokens; expected a multiple of 16"):
        family_network(tiny.cogview4(), (8, 12), 40)
