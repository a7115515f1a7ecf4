"""Chroma from prompts: T5 alone, whose mask the transformer reads, and guidance by two predictions."""

from __future__ import annotations

import pytest
import torch
from diffusers import ChromaPipeline, FlowMatchEulerDiscreteScheduler

from dit_export.networks.families import family_network
from dit_runtime.bundle import manifest
from tests.families import tiny
from tests.families.elsewhere import Elsewhere
from tests.networks.tiny import TOKENS, chroma, distance, inputs, run

JOINT, SINGLE, T5_TOKENS = 1, 1, 72


def make_pipeline() -> ChromaPipeline:
    t5 = tiny.t5_tokenizer()
    return ChromaPipeline(
        transformer=chroma(num_layers=JOINT, num_single_layers=SINGLE, joint_attention_dim=64),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, use_beta_sigmas=True),
        vae=tiny.vae(),
        text_encoder=tiny.t5(t5, layers=1),
        tokenizer=t5,
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> tiny.Case:
    pipeline = make_pipeline()
    with one_thread():
        bundle = tiny.build(pipeline, tmp_path_factory.mktemp("chroma"), caption_tokens=T5_TOKENS, resolution="64x96")
    return tiny.Case(pipeline, bundle, {"height": 64, "width": 96, "max_sequence_length": T5_TOKENS})


@pytest.mark.slow
def test_a_prompt_is_diffusers(case) -> None:
    tiny.accept(case)


class TestElsewhere(Elsewhere):
    """On OpenVINO, without PyTorch, in C++."""


@pytest.mark.slow
def test_what_leaves_the_loop(case) -> None:
    """As in FLUX.1: 12 vectors a joint block, 3 a single one, 2 at the end, here of the time alone."""
    contract = manifest.read(case.bundle)
    (stage,) = [stage for stage in contract.stages if stage.runs == "time"]
    assert [spec.shape[1] for spec in stage.gives] == [12 * JOINT + 3 * SINGLE + 2]
    assert not [stage for stage in contract.stages if stage.runs == "time+condition"]
    assert (contract.guidance.default, contract.process.sampler.steps) == (5.0, 35)


@pytest.mark.slow
def test_another_curve_is_seen(case) -> None:
    """Chroma1-HD's scheduler has use_beta_sigmas; here it must move the picture."""
    assert manifest.read(case.bundle).process.sampler.flow_curve == "beta"
    expected = case.theirs()
    assert max(tiny.distances(case.ours(spacing="trailing"), expected)) < tiny.ANOTHER


def test_a_wrapper_is_diffusers() -> None:
    """Packing, positions, the mask and the embedding of the time, which is replaced."""
    transformer, size = chroma(), (8, 12)
    network = family_network(chroma(), size, TOKENS)
    values = inputs(network, 3)
    velocity = transformer(
        ChromaPipeline._pack_latents(values["latents"], 3, 16, *size),
        timestep=1000 * values["timesteps"] / 1000,
        encoder_hidden_states=values["captions"],
        attention_mask=torch.cat([values["mask"], torch.ones(3, 24)], dim=1),
        img_ids=ChromaPipeline._prepare_latent_image_ids(3, 4, 6, "cpu", torch.float32),
        txt_ids=torch.zeros(TOKENS, 3),
    ).sample
    expected = ChromaPipeline._unpack_latents(velocity, 64, 96, 8)
    assert torch.equal(run(network, values), expected)
    assert family_network(network.module.transformer, size, TOKENS).ports == network.ports  # a second time
    others = inputs(network, 3, seed=1)
    for port in network.ports:
        assert distance(run(network, values | {port.name: others[port.name]}), expected) > 0.01, port.name
