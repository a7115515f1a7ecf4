"""Stable Diffusion 3.5 from prompts: two CLIPs and T5."""

from __future__ import annotations

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from tests.families import tiny
from tests.networks.tiny import SD3_5, sd3

T5_TOKENS = 32


def make_pipeline(with_t5: bool = True) -> StableDiffusion3Pipeline:
    clip, t5 = tiny.clip_tokenizer(), tiny.t5_tokenizer()
    widths = {"joint_attention_dim": 64, "pooled_projection_dim": 48}
    return StableDiffusion3Pipeline(
        transformer=sd3(**SD3_5, **widths, num_layers=3, sample_size=8),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny.vae(),
        text_encoder=tiny.clip(clip),
        tokenizer=clip,
        text_encoder_2=tiny.clip(clip, seed=1),
        tokenizer_2=clip,
        text_encoder_3=tiny.t5(t5) if with_t5 else None,
        tokenizer_3=t5 if with_t5 else None,
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> tiny.Case:
    pipeline = make_pipeline()
    with one_thread():
        bundle = tiny.build(pipeline, tmp_path_factory.mktemp("sd3"), caption_tokens=77 + T5_TOKENS)
    return tiny.Case(pipeline, bundle, {"height": 64, "width": 64, "max_sequence_length": T5_TOKENS})


def test_a_prompt_is_diffusers(case) -> None:
    tiny.accept(case)
