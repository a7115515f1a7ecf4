"""Sana from prompts: Gemma 2 after an instruction, DC-AE, and DPM-Solver++ on a flow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline

from dit_runtime.bundle import manifest
from tests.families import tiny
from tests.networks import tiny as networks

TOKENS, BLOCKS = 80, 3


def gemma(tokenizer: Any, width: int = 48) -> Any:
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        query_pre_attn_scalar=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return networks.randomize(transformers.Gemma2Model(config))


def dc(channels: int) -> Any:
    """A DC-AE of six stages, so 32 pixels a latent, of both kinds of blocks."""
    torch.manual_seed(0)
    fields = {
        "block_types": ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
        "block_out_channels": (8, 8, 16, 16, 32, 32),
        "layers_per_block": (1,) * 6,
        "qkv_multiscales": ((),) * 4 + ((5,),) * 2,
    }
    sides = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in fields.items()}
    return AutoencoderDC(latent_channels=channels, attention_head_dim=8, scaling_factor=0.41407, **sides).eval()


def make_pipeline() -> SanaPipeline:
    tokenizer = tiny.byte_tokenizer(bos="<bos>", padding_side="left")
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma(tokenizer),
        vae=dc(8),
        transformer=networks.sana(num_layers=BLOCKS, sample_size=4),
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> tiny.Case:
    pipeline = make_pipeline()
    with one_thread():
        bundle = tiny.build(pipeline, tmp_path_factory.mktemp("sana"), caption_tokens=TOKENS)
    call = {"height": 128, "width": 128, "max_sequence_length": TOKENS, "use_resolution_binning": False}
    return tiny.Case(pipeline, bundle, call)


def test_a_prompt_is_diffusers(case) -> None:
    tiny.accept(case)


def test_what_leaves_the_loop(case) -> None:
    """Six vectors a block and two at the end change with the time; each block's keys and values with the prompt."""
    contract = manifest.read(case.bundle)
    given = {stage.runs: [tensor.shape[1:] for tensor in stage.gives] for stage in contract.stages}
    assert given["time"] == [(6 * BLOCKS + 2, 64)]
    assert sum(shape[0] for shape in given["condition"] if shape[-1] == 64) == 2 * BLOCKS * TOKENS
    assert (
        contract.guidance.default == 4.5
        and contract.process.sampler.steps == 20
        and contract.process.sampler.solver == "dpm++"
    )
    assert contract.model["resolution"] == 128
