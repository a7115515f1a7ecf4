"""Sana from prompts: Gemma 2 after an instruction, DC-AE, and DPM-Solver++ on a flow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaSprintPipeline, SCMScheduler

from dit_export.checkpoints import load
from dit_export.networks.families.sana import EXTRA, instruction
from dit_export.recipe import Recipe
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from tests.families import editing, tiny
from tests.families.elsewhere import Elsewhere
from tests.networks import tiny as networks

TOKENS, BLOCKS = 80, 2


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
        "block_types": ("ResBlock",) * 5 + ("EfficientViTBlock",),
        "block_out_channels": (8, 8, 16, 16, 32, 32),
        "layers_per_block": (1,) * 6,
        "qkv_multiscales": ((),) * 5 + ((5,),),
    }
    sides = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in fields.items()}
    return AutoencoderDC(latent_channels=channels, attention_head_dim=8, scaling_factor=0.41407, **sides).eval()


def make_pipeline(sprint: bool = False) -> Any:
    tokenizer = tiny.byte_tokenizer(bos="<bos>", padding_side="left")
    parts = {"tokenizer": tokenizer, "text_encoder": gemma(tokenizer), "vae": dc(8)}
    if sprint:
        config = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "sample_size": 4}
        return SanaSprintPipeline(transformer=networks.sana(**config), scheduler=SCMScheduler(), **parts)
    return SanaPipeline(
        transformer=networks.sana(num_layers=BLOCKS, sample_size=4),
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        **parts,
    )


CALL = {"height": 128, "width": 128, "max_sequence_length": TOKENS, "use_resolution_binning": False}


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # its np.array(tensor)


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> tiny.Case:
    pipeline = make_pipeline()
    with one_thread():
        return tiny.Case(pipeline, tiny.build(pipeline, tmp_path_factory.mktemp("sana"), caption_tokens=TOKENS), CALL)


def test_a_prompt_is_diffusers(case) -> None:
    tiny.accept(case)


class TestElsewhere(Elsewhere):
    """On OpenVINO, without PyTorch, in C++."""


@pytest.mark.slow
def test_sprint_is_diffusers(tmp_path, one_thread) -> None:
    """The weight is an input, and a run of two steps has an angle of its own."""
    pipeline = make_pipeline(sprint=True)
    with one_thread():
        bundle = tiny.build(pipeline, tmp_path, caption_tokens=TOKENS, encoder=True)
        tiny.accept(tiny.Case(pipeline, bundle, CALL | {"intermediate_timesteps": None}, negative=None))
        two, contract = tiny.Case(pipeline, bundle, CALL, negative=None), manifest.read(bundle)
        assert min(tiny.distances(two.ours(steps=2), two.theirs(steps=2))) >= tiny.SAME
        assert max(tiny.distances(two.ours(steps=1), two.theirs(steps=2))) < tiny.ANOTHER
        editing.accept_encoder(two, lambda images: 0.41407 * pipeline.vae.encode(images).latent)
    assert (contract.process.sampler.solver, contract.process.sampler.steps) == ("scm", 2)
    assert (contract.guidance.port, contract.guidance.default) == ("guidance_scale", 4.5)


def test_a_negative_prompt_has_no_instruction(case) -> None:
    """The bundle knows both templates, and the tokens of the instruction come on top of a caption's."""
    (prompt,) = manifest.read(case.bundle).prompts
    tokenizer = case.pipeline.tokenizer
    assert prompt.template == f"{instruction()}{{}}" and prompt.negative == "{}" and prompt.lowercase
    assert prompt.tokens == len(tokenizer.encode(instruction())) + TOKENS - EXTRA


@pytest.mark.parametrize(
    ("changes", "recipe", "said"),
    [
        ({}, {"resolution": 48}, "resolution 48; expected a multiple of 32"),
        ({"out_channels": 12}, {}, "out_channels is 12, expected 8 or 16"),
    ],
)
def test_what_is_refused(tmp_path, changes, recipe, said) -> None:
    networks.sana(**changes).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=said):
        load(Recipe(checkpoint=str(tmp_path), latents_only=True, **recipe))


def test_a_size_in_pixels(tmp_path) -> None:
    networks.sana().save_pretrained(tmp_path)
    network = load(Recipe(checkpoint=str(tmp_path), latents_only=True, resolution="64x96")).network
    assert network.state.shape == (8, 2, 3) and network.model["resolution"] == "64x96" and network.pixels == 32
    process = load(Recipe(checkpoint=str(tmp_path), latents_only=True)).process
    assert (process.shift, process.sampler.solver, process.sampler.flow_spacing) == (3.0, "dpm++", "discrete")


def test_what_leaves_the_loop(case) -> None:
    """Six vectors a block and two at the end change with the time; each block's keys and values with the prompt."""
    contract = manifest.read(case.bundle)
    shapes = {stage.runs: [tensor.shape[1:] for tensor in stage.gives] for stage in contract.stages}
    assert shapes["time"] == [(6 * BLOCKS + 2, 64)]
    assert sum(shape[0] for shape in shapes["condition"] if shape[-1] == 64) == 2 * BLOCKS * TOKENS
    assert (
        contract.guidance.default == 4.5
        and contract.process.sampler.steps == 20
        and contract.process.sampler.solver == "dpm++"
    )
    assert contract.model["resolution"] == 128
