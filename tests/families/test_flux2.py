"""FLUX.2-klein: a bundle's pictures are those of diffusers' pipeline, at any number of steps."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from dit_export.checkpoints import load
from dit_export.checkpoints.scheduler import read_scheduler_config
from dit_export.networks.codec import make_decoder
from dit_export.networks.families import family_network, flux2
from dit_export.recipe import Recipe
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from dit_runtime.sampling.process import Process
from dit_runtime.sampling.schedule import sigmas
from tests.families import editing, tiny
from tests.families.elsewhere import Elsewhere
from tests.networks.tiny import distance, inputs, randomize, run
from tests.networks.tiny import flux2 as tiny_flux2

TOKENS, LAYERS = 128, (0, 1, 2)
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make_vae() -> AutoencoderKLFlux2:
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
    )
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae.eval()


def make_pipeline() -> Flux2KleinPipeline:
    special = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
    tokenizer = tiny.byte_tokenizer(*special, pad="<|endoftext|>", chat_template=CHAT)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=max(LAYERS) + 1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Flux2KleinPipeline(
        transformer=tiny_flux2(num_layers=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_vae(),
        text_encoder=randomize(transformers.Qwen3ForCausalLM(config)),
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> tiny.Case:
    pipeline, call = make_pipeline(), {"max_sequence_length": TOKENS, "text_encoder_out_layers": LAYERS}
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux2, "LAYERS", LAYERS)  # the encoder is too small for klein's
        folder = tmp_path_factory.mktemp("flux2")
        bundle = tiny.build(pipeline, folder, caption_tokens=TOKENS, resolution="64x96", encoder=True)

    return tiny.Case(pipeline, bundle, {"height": 64, "width": 96} | call, negative=None)


@pytest.mark.slow
def test_a_prompt_is_diffusers(case) -> None:
    tiny.accept(case)


class TestElsewhere(Elsewhere):
    """On OpenVINO, without PyTorch, in C++."""


@pytest.mark.slow
def test_a_picture_becomes_latents(case) -> None:
    editing.accept_encoder(case, lambda images: case.pipeline._encode_vae_image(images, None))


@pytest.mark.slow
def test_another_number_of_steps(case) -> None:
    """The shift of the bundle follows the number of steps, as the pipeline's does."""
    expected = case.theirs(steps=9)
    assert min(tiny.distances(case.ours(steps=9), expected)) >= tiny.SAME
    contract = manifest.read(case.bundle)
    assert contract.process.shift_growth < 0
    assert (contract.guidance.default, contract.process.sampler.steps) == (4.0, 50)


def test_a_distilled_network_runs_without_guidance(tmp_path) -> None:
    tiny_flux2().save_pretrained(tmp_path / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    for distilled, guidance, steps in ((True, 1.0, 4), (False, 4.0, 50)):
        index = {"_class_name": "Flux2KleinPipeline", "is_distilled": distilled}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        loaded = load(Recipe(checkpoint=str(tmp_path), latents_only=True))
        assert (loaded.network.guidance, loaded.process.sampler.steps) == (guidance, steps)


def test_dev_has_an_embedded_guidance() -> None:
    transformer = tiny_flux2(guidance_embeds=True)
    network = family_network(transformer, (4, 6), 12)
    values = inputs(network, 2) | {"guidance_scale": torch.tensor([1.5, 4.0])}
    packed = Flux2KleinPipeline._pack_latents(values["latents"])
    with torch.no_grad():
        expected = transformer(
            packed,
            encoder_hidden_states=values["captions"],
            timestep=values["timesteps"],
            img_ids=Flux2KleinPipeline._prepare_latent_ids(values["latents"]),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(values["captions"]),
            guidance=values["guidance_scale"],
        ).sample
    assert torch.equal(run(network, values).flatten(2).transpose(1, 2), expected)
    assert (network.guidance, network.guidance_port) == (4.0, "guidance_scale")
    with pytest.raises(UsageError, match=r"FLUX\.2-dev, by Mistral, are not supported: pass --without-text-encoders"):
        flux2.Flux2Prompt({}, transformer, 12)


@pytest.mark.slow
def test_what_leaves_the_loop(case) -> None:
    """All blocks share 15 vectors, and the end has 2."""
    timed = [tensor for stage in manifest.read(case.bundle).stages if stage.runs == "time" for tensor in stage.gives]
    assert [tensor.shape for tensor in timed] == [("rows", 17, 64)]


def process(tokens: int, **config: Any) -> Process:
    said = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True}
    return read_scheduler_config(said | config, tokens=tokens, spacing="trailing", mu=flux2.mu)


@pytest.mark.parametrize("tokens", [256, 4096, 4300, 4301, 8192])
def test_sigmas_are_diffusers(tokens) -> None:
    """μ is linear in the number of steps up to 4300 image tokens, and the same for every number above."""
    ours, scheduler = process(tokens), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for steps in (1, 4, 10, 50, 200):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
        np.testing.assert_allclose(sigmas(ours, "euler", steps), scheduler.sigmas, rtol=0, atol=1e-6)
    assert (ours.shift_growth == 0) == (tokens > 4300)


def test_the_number_of_steps_is_seen() -> None:
    """The test above could pass on a growth that is ignored."""
    growing = process(256)
    settled = Process(prediction="velocity", shift=growing.shift_over(4), sampler=growing.sampler)
    np.testing.assert_array_equal(sigmas(growing, "euler", 4), sigmas(settled, "euler", 4))
    assert np.abs(sigmas(growing, "euler", 50) - sigmas(settled, "euler", 50)).max() > 0.01


def test_a_shift_without_growth() -> None:
    static = process(256, use_dynamic_shifting=False)
    assert (static.shift, static.shift_growth) == (3, 0)
    with pytest.raises(UsageError, match="time_shift_type = 'linear' is not supported where μ depends on the number"):
        process(256, time_shift_type="linear")


def test_a_decoder_undoes_the_batch_norm() -> None:
    """As the pipeline does, for the state whose noise it draws."""
    vae, latents = make_vae(), torch.randn(2, 16, 4, 6)
    decoder = make_decoder(vae)
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    raw = latents * deviation.view(1, -1, 1, 1) + vae.bn.running_mean.view(1, -1, 1, 1)
    with torch.no_grad():
        expected = vae.decode(Flux2KleinPipeline._unpatchify_latents(raw)).sample / 2 + 0.5
        assert torch.equal(decoder(latents), expected.clamp(0, 1))
        vae.bn.running_var[3] *= 2
        assert distance(decoder(latents), expected.clamp(0, 1)) > 1e-3
    assert (decoder.channels, decoder.pixels) == (16, 16)


def test_ports() -> None:
    network = family_network(tiny_flux2())
    assert [port.shape for port in network.ports] == [(16, 64, 64), (), (512, 48)]
    assert network.pixels == 16 and network.model["resolution"] == 1024
