"""Qwen-Image from a whole pipeline of diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from dit_export.networks.codec import make_decoder
from dit_export.networks.families import family_network
from dit_runtime.bundle import manifest
from tests.families import editing
from tests.families import tiny as families
from tests.families.elsewhere import Elsewhere
from tests.networks import tiny
from tests.networks.tiny import TOKENS, randomize

BLOCKS, SIDE, WIDTH, CAPTION = 2, 8, 48, 224


def language(tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL with a small vision half, which prompts do not reach."""
    last = len(tokenizer) - 1
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH}
    special = {f"{name}_token_id": last for name in ("image", "video", "vision_start", "vision_end")}
    return randomize(
        Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special))
    )


def codec() -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 3  # pictures that use a good part of 0 to 1
    return vae.eval()


def make_pipeline() -> QwenImagePipeline:
    tokenizer = families.byte_tokenizer("<|im_start|>", "<|im_end|>", pad="<|endoftext|>")
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    transformer = tiny.qwen_image(num_layers=BLOCKS)
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.attn.norm_added_k.weight *= 3  # attention that looks at few tokens of the prompt, not at all equally
    return QwenImagePipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=codec(),
        text_encoder=language(tokenizer),
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> families.Case:
    pipeline, folder = make_pipeline(), tmp_path_factory.mktemp("qwenimage")
    with one_thread():
        bundle = families.build(pipeline, folder, caption_tokens=CAPTION, resolution=8 * SIDE, encoder=True)
    return families.Case(pipeline, bundle, {"height": 8 * SIDE, "width": 8 * SIDE}, weight="true_cfg_scale")


@pytest.mark.slow
def test_a_prompt_is_diffusers(case) -> None:
    families.accept(case)


class TestElsewhere(Elsewhere):
    """On OpenVINO, without PyTorch, in C++."""


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["image", "inpainting"])
def test_from_pictures(case, masked) -> None:
    pipelines = editing.Pipelines(QwenImageImg2ImgPipeline, QwenImageInpaintPipeline)
    editing.accept(editing.Edit(case, pipelines, masked), editing.SAME, strength=0.6, count=2)


@pytest.mark.slow
def test_what_leaves_the_loop(case) -> None:
    """Each block's modulation leaves, 6 vectors a stream, 2 of the last block's text stream, and 2 at the end."""
    contract = manifest.read(case.bundle)
    timed = [tensor for stage in contract.stages if stage.runs.startswith("time") for tensor in stage.gives]
    assert [tensor.shape for tensor in timed] == [("rows", 12 * BLOCKS - 2, 64)]


def test_a_wrapper_is_diffusers() -> None:
    """Packing, positions and masks as the pipeline has them, at a size that is no square."""
    transformer, size = tiny.qwen_image(), (8, 12)
    network = family_network(transformer, size, TOKENS)
    values = tiny.inputs(network, 3)
    packed = QwenImagePipeline._pack_latents(values["latents"][:, None], 3, 16, *size)
    velocity = transformer(
        packed,
        timestep=values["timesteps"],
        encoder_hidden_states=values["captions"],
        encoder_hidden_states_mask=values["mask"],
        img_shapes=[[(1, 4, 6)]] * 3,
    ).sample
    expected = QwenImagePipeline._unpack_latents(velocity, 64, 96, 8)[:, :, 0]
    assert torch.equal(tiny.run(network, values), expected)
    others = tiny.inputs(network, 3, seed=1)
    for port in network.ports:
        assert tiny.distance(tiny.run(network, values | {port.name: others[port.name]}), expected) > 0.01, port.name


def test_its_decoder_is_diffusers() -> None:
    vae = codec()
    decoder = make_decoder(vae)
    assert (decoder.channels, decoder.pixels) == (16, 8)
    latents = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, 16, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        images = decoder(latents)
        expected = (vae.decode(latents[:, :, None] * std + mean).sample[:, :, 0] / 2 + 0.5).clamp(0, 1)
        assert tiny.distance(images, expected) <= 1e-6  # without the products with zeros
        assert tiny.distance(decoder(latents.flip(2)), expected) > 0.01
