"""Z-Image from a whole pipeline of diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from numpy.typing import NDArray
from torch import Tensor

from dit_export.checkpoints import load
from dit_export.networks.families import family_network
from dit_export.networks.families.zimage import TEMPLATE
from dit_export.recipe import Recipe
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from tests.families import tiny as families
from tests.families.elsewhere import Elsewhere
from tests.families.test_lumina2 import with_lengths
from tests.networks import tiny

TOKENS = 64
CAPTION, SIDE = 128, 8  # a byte is a token


def qwen3(tokenizer: Any) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tiny.randomize(transformers.Qwen3Model(config))


def make_pipeline() -> ZImagePipeline:
    tokenizer = families.byte_tokenizer("<|im_start|>", "<|im_end|>", pad="<|endoftext|>", padding_side="left")
    tokenizer.chat_template = TEMPLATE.replace("{}", "{{ messages[0].content }}") + "\n"  # one is dropped at the end
    transformer = tiny.z_image()
    with torch.no_grad():
        for block in transformer.layers:
            block.attention.norm_k.weight *= 3  # attention that looks at few tokens, not at all equally
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=families.vae(),
        text_encoder=qwen3(tokenizer),
        tokenizer=tokenizer,
    )


class Case(families.Case):
    """The pipeline's guidance_scale is the weight less 1: at 0 it is not guided."""

    def theirs(self, *args: Any, guidance: float = families.GUIDANCE, **options: Any) -> NDArray[np.float32]:
        return super().theirs(*args, guidance=guidance - 1, **options)


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> Case:
    pipeline, folder = make_pipeline(), tmp_path_factory.mktemp("zimage")
    with one_thread():
        bundle = families.build(pipeline, folder, caption_tokens=CAPTION, resolution=8 * SIDE)
    call = {"height": 8 * SIDE, "width": 8 * SIDE, "max_sequence_length": CAPTION}
    return Case(pipeline, bundle, call)


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
    """Return dx/dσ as the pipeline makes it of the transformer's own forward, with a list of pictures and prompts."""
    lengths = values["mask"].sum(1).long().tolist()
    captions = [rows[:length] for rows, length in zip(values["captions"], lengths, strict=True)]
    pictures = list(values["latents"][:, :, None])
    return -torch.stack(transformer(pictures, 1 - values["timesteps"], captions).sample)[:, :, 0]


@pytest.mark.parametrize("size", [(8, 12), (16, 8)])  # 24 image tokens, which are filled up, and 32
@pytest.mark.parametrize("lengths", [[64, 64, 64, 64], [1, 31, 32, 33], [40, 40, 40, 40]])
def test_a_wrapper_is_diffusers(size, lengths) -> None:
    """Prompts of all lengths in one batch, though diffusers' own forward cuts each to its length."""
    transformer = tiny.z_image()
    network = family_network(transformer, size, TOKENS)
    values = with_lengths(tiny.inputs(network, 4), lengths)
    got, expected = tiny.run(network, values), theirs(transformer, values)
    assert max(tiny.distance(*rows) for rows in zip(got, expected, strict=True)) <= 2e-6
    others = tiny.inputs(network, 4, seed=1)
    for port in network.ports:
        changed = tiny.run(network, values | {port.name: others[port.name]})
        assert tiny.distance(changed, expected) > 0.01, port.name


def test_neighbours_change_nothing() -> None:
    network = family_network(tiny.z_image(), (8, 12), TOKENS)
    values = with_lengths(tiny.inputs(network, 3), [4, 64, 33])
    together = tiny.run(network, values)
    for row in range(3):
        alone = tiny.run(network, {name: value[row : row + 1] for name, value in values.items()})
        assert tiny.distance(together[row : row + 1], alone) <= 1e-6
    beyond = values["captions"] + 9 * (1 - values["mask"])[..., None]  # what a prompt does not have
    assert tiny.distance(tiny.run(network, values | {"captions": beyond}), together) <= 1e-6


@pytest.mark.slow
def test_in_int8(tmp_path, one_thread) -> None:
    """The measuring run, too, opens a context that has attention of its own."""
    pipeline = make_pipeline()
    with one_thread():
        bundle = families.build(pipeline, tmp_path, caption_tokens=CAPTION, resolution=8 * SIDE, precision="int8")
    call = {"height": 8 * SIDE, "width": 8 * SIDE, "max_sequence_length": CAPTION}
    case = Case(pipeline, bundle, call)
    expected = case.theirs()
    assert min(families.distances(case.ours(), expected)) >= 28  # measured 33.0
    assert max(families.distances(case.ours(seed=families.SEED + 9), expected)) < 20


def test_the_schedule_tells_turbo_from_base(tmp_path) -> None:
    tiny.z_image().save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    for shift, guidance, steps in ((3.0, 1.0, 8), (6.0, 6.0, 50)):
        FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(tmp_path / "scheduler")
        loaded = load(Recipe(checkpoint=str(tmp_path), latents_only=True, resolution=64))
        assert (loaded.network.guidance, loaded.process.sampler.steps) == (guidance, steps)
        assert loaded.process.shift == shift


def test_another_chat_template_is_refused(tmp_path) -> None:
    pipeline = make_pipeline()
    recipe = Recipe(checkpoint=str(tmp_path), latents_only=True, caption_tokens=CAPTION, resolution=64)
    pipeline.save_pretrained(tmp_path)
    assert load(recipe).text.prompts[0].template == TEMPLATE
    pipeline.tokenizer.chat_template = "{{ messages[0].content }}"
    pipeline.tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UsageError, match=r"its chat template makes '\{\}' of a prompt, expected '<\|im_start"):
        load(recipe)


def test_what_is_refused() -> None:
    family_network(tiny.z_image(), (8, 12), 576)
    with pytest.raises(UsageError, match="captions of 40 tokens; expected a multiple of 32"):
        family_network(tiny.z_image(), (8, 12), 40)
    with pytest.raises(UsageError, match="captions of 608 tokens; the position table has room for 598"):
        family_network(tiny.z_image(), (8, 12), 608)
    with pytest.raises(UsageError, match="siglip_feat_dim is 8, expected None"):
        family_network(tiny.z_image(siglip_feat_dim=8), (8, 12), TOKENS)
