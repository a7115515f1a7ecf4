"""AuraFlow: a bundle's pictures are those of diffusers' pipeline."""

from __future__ import annotations

import pytest
import transformers
from diffusers import AuraFlowPipeline, FlowMatchEulerDiscreteScheduler

from dit_export.networks.families import family_network
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from tests.families import tiny
from tests.families.elsewhere import Elsewhere
from tests.networks.tiny import auraflow, randomize

TOKENS = 96


def make_pipeline() -> AuraFlowPipeline:
    tokenizer = tiny.t5_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # the pipeline passes all of them to the encoder
    config = transformers.UMT5Config(vocab_size=len(tokenizer), d_model=48, d_kv=12, d_ff=96, num_layers=1, num_heads=4)
    return AuraFlowPipeline(
        transformer=auraflow(num_mmdit_layers=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=tiny.vae(4, shift_factor=None, scaling_factor=0.13025, use_quant_conv=True, use_post_quant_conv=True),
        text_encoder=randomize(transformers.UMT5EncoderModel(config)),
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> tiny.Case:
    pipeline = make_pipeline()
    with one_thread():
        bundle = tiny.build(pipeline, tmp_path_factory.mktemp("auraflow"), caption_tokens=TOKENS, resolution="64x96")

    return tiny.Case(pipeline, bundle, {"height": 64, "width": 96, "max_sequence_length": TOKENS})


@pytest.mark.slow
def test_a_prompt_is_diffusers(case) -> None:
    tiny.accept(case)


class TestElsewhere(Elsewhere):
    """On OpenVINO, without PyTorch, in C++."""


@pytest.mark.slow
def test_what_leaves_the_loop(case) -> None:
    """Each block's modulation leaves, 6 vectors a stream, and 2 of the end."""
    contract = manifest.read(case.bundle)
    assert (contract.guidance.default, contract.process.sampler.steps) == (3.5, 50)
    timed = [tensor for stage in contract.stages if stage.runs == "time" for tensor in stage.gives]
    assert [tensor.shape for tensor in timed] == [("rows", 12 * 1 + 6 * 1 + 2, 64)]


def test_a_size_beyond_the_position_table() -> None:
    assert family_network(auraflow(), (16, 16), TOKENS).state.shape == (4, 16, 16)
    with pytest.raises(UsageError, match="latents of side 18; its position table ends at 16"):
        family_network(auraflow(), (8, 18), TOKENS)
