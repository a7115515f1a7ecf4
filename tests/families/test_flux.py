"""FLUX.1 from prompts, CLIP and T5: dev with embedded guidance, schnell with none of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from dit_export.networks.families import family_network
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from tests.families import tiny
from tests.networks.tiny import TOKENS, distance, flux, inputs, run

JOINT, SINGLE, T5_TOKENS = 2, 1, 32


def make_pipeline(embedded: bool = True, **scheduler: Any) -> FluxPipeline:
    clip, t5 = tiny.clip_tokenizer(), tiny.t5_tokenizer()
    widths = {"joint_attention_dim": 64, "pooled_projection_dim": 32}
    return FluxPipeline(
        transformer=flux(guidance_embeds=embedded, num_layers=JOINT, num_single_layers=SINGLE, **widths),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=tiny.vae(),
        text_encoder=tiny.clip(clip, projection=None, layers=1),
        tokenizer=clip,
        text_encoder_2=tiny.t5(t5, layers=1),
        tokenizer_2=t5,
    )


def make_case(pipeline: FluxPipeline, folder: Any, **fields: Any) -> tiny.Case:
    bundle = tiny.build(pipeline, folder, caption_tokens=T5_TOKENS, resolution="64x96")
    return tiny.Case(pipeline, bundle, {"height": 64, "width": 96, "max_sequence_length": T5_TOKENS}, **fields)


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> tiny.Case:
    pipeline = make_pipeline(shift=3.0, use_dynamic_shifting=True)
    with one_thread():
        return make_case(pipeline, tmp_path_factory.mktemp("flux"), negative=None)


def test_a_prompt_is_diffusers(case) -> None:
    tiny.accept(case)


def test_openvino_draws_it(case, tmp_path) -> None:
    moved = replace(case, bundle=tiny.on_backend("openvino", case.bundle, tmp_path / "bundle"))
    expected = case.theirs()
    assert min(tiny.distances(moved.ours(), expected)) >= tiny.SAME
    assert max(tiny.distances(moved.ours(guidance=2 * tiny.GUIDANCE), expected)) < tiny.ANOTHER


@pytest.mark.slow
def test_schnell_is_diffusers(tmp_path, one_thread) -> None:
    """Its own runs have no guidance; true guidance with a negative prompt mixes two predictions."""
    with one_thread():
        case = make_case(make_pipeline(embedded=False, shift=1.0), tmp_path, weight="true_cfg_scale")
    tiny.accept(case)
    contract = manifest.read(case.bundle)
    assert (contract.guidance.default, contract.process.sampler.steps) == (1.0, 4) and contract.mixes_guidance


def test_what_leaves_the_loop(case) -> None:
    """12 vectors a joint block, 3 a single one, 2 at the end; nothing with tokens is made every step."""
    contract = manifest.read(case.bundle)
    timed = [tensor for stage in contract.stages if stage.runs.startswith("time") for tensor in stage.gives]
    assert sum(tensor.shape[1] for tensor in timed) == 12 * JOINT + 3 * SINGLE + 2
    assert all(len(tensor.shape) == 3 for tensor in timed)
    assert "captions" not in {tensor.name for tensor in contract.step.reads}


def test_defaults_are_the_pipelines(case) -> None:
    contract = manifest.read(case.bundle)
    assert (contract.guidance.default, contract.guidance.port) == (3.5, "guidance_scale")
    assert contract.process.sampler.steps == 28 and not contract.mixes_guidance
    expected = case.pipeline(
        prompt=tiny.PROMPT, generator=torch.Generator().manual_seed(0), output_type="np", **case.call
    ).images
    assert min(tiny.distances(case.ours(seed=0, guidance=None, steps=None), expected)) >= tiny.SAME


def test_ports() -> None:
    network = family_network(flux())
    assert [port.shape for port in network.ports] == [(16, 128, 128), (), (512, 48), (40,), ()]
    assert network.model["resolution"] == 1024 and not network.learned_variance
    with pytest.raises(UsageError, match="latents of 9 x 8 do not divide into patches of 2"):
        family_network(flux(), (9, 8))


@pytest.mark.parametrize("embedded", [True, False])
def test_a_wrapper_is_diffusers(embedded) -> None:
    """Packing and positions as the pipeline has them, at a size that is no square."""
    transformer, size = flux(guidance_embeds=embedded), (8, 12)
    network = family_network(transformer, size, TOKENS)
    values = inputs(network, 3)
    packed = FluxPipeline._pack_latents(values["latents"], 3, 16, *size)
    velocity = transformer(
        packed,
        timestep=1000 * values["timesteps"] / 1000,
        encoder_hidden_states=values["captions"],
        pooled_projections=values["pooled"],
        guidance=values.get("guidance_scale"),
        img_ids=FluxPipeline._prepare_latent_image_ids(3, 4, 6, "cpu", torch.float32),
        txt_ids=torch.zeros(TOKENS, 3),
    ).sample
    expected = FluxPipeline._unpack_latents(velocity, 64, 96, 8)
    assert torch.equal(run(network, values), expected)
    others = inputs(network, 3, seed=1)
    for port in network.ports:
        assert distance(run(network, values | {port.name: others[port.name]}), expected) > 0.01, port.name
