"""Hunyuan-DiT from prompts: BERT and mT5 with masks, noise at each step, and skips between the blocks."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

from dit_export.checkpoints.scheduler import read_scheduler_config
from dit_export.networks.families import family_network
from dit_export.networks.families.hunyuandit import HUNYUAN_DIT, span
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from tests.families import pipelines
from tests.families import tiny as families
from tests.families.elsewhere import Elsewhere
from tests.networks import tiny

TOKENS = 32  # of both captions


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> families.Case:
    pipeline = pipelines.hunyuan_dit()
    pipeline.register_modules(transformer=tiny.hunyuan_dit(text_len=77, text_len_t5=256))
    with one_thread():
        bundle = families.build(pipeline, tmp_path_factory.mktemp("hunyuandit"))
    return families.Case(pipeline, bundle, {"height": 64, "width": 64, "use_resolution_binning": False})


@pytest.mark.slow
def test_a_prompt_is_diffusers(case) -> None:
    families.accept(case)


class TestElsewhere(Elsewhere):
    """On OpenVINO, without PyTorch, in C++."""


@pytest.mark.slow
def test_what_leaves_the_loop(case) -> None:
    """A step takes a vector a block and 2 at the end; the keys and values of both captions are a prompt's."""
    contract = manifest.read(case.bundle)
    timed = [tensor for stage in contract.stages if stage.runs.startswith("time") for tensor in stage.gives]
    assert [tensor.shape for tensor in timed] == [("rows", 4 + 2, 64)]


@pytest.mark.parametrize("sized", [True, False])
def test_a_wrapper_is_diffusers(sized) -> None:
    """Sizes, style and positions as the pipeline has them, at a size that is no square; version 1.2 has no sizes."""
    options = {"use_style_cond_and_image_meta_size": sized}
    network = family_network(tiny.hunyuan_dit(**options), (8, 12), TOKENS)
    values = tiny.inputs(network, 3, span=1000.0)
    head, grid = 32, (4, 6)
    expected = tiny.hunyuan_dit(**options)(
        values["latents"],
        values["timesteps"],
        encoder_hidden_states=values["captions"],
        text_embedding_mask=values["mask"],
        encoder_hidden_states_t5=values["captions_2"],
        text_embedding_mask_t5=values["mask_2"],
        image_meta_size=torch.tensor([[1024.0, 1024, 64, 96, 0, 0]] * 3),
        style=torch.tensor([0] * 3),
        image_rotary_emb=get_2d_rotary_pos_embed(head, get_resize_crop_region_for_grid(grid, 32), grid),
    ).sample
    assert tiny.distance(tiny.run(network, values), expected) <= 1e-6  # the sums of the pool are in another order
    others = tiny.inputs(network, 3, seed=1, span=1000.0)
    for port in network.ports:
        assert tiny.distance(tiny.run(network, values | {port.name: others[port.name]}), expected) > 0.01, port.name


@pytest.mark.parametrize("grid", [(64, 64), (48, 64), (80, 48), (5, 7), (7, 6)])
def test_positions_span_a_square(grid) -> None:
    assert span(grid, 32) == get_resize_crop_region_for_grid(grid, 32)


def test_captions_have_the_length_of_the_tables() -> None:
    with pytest.raises(UsageError, match="caption-tokens 24: HunyuanDiT2DModel has tables for 32 tokens"):
        family_network(tiny.hunyuan_dit(), tokens=24)


def test_its_schedule() -> None:
    """The schedule of a transformer without a pipeline is its version's."""
    ends = {}
    for sized in (True, False):
        process = read_scheduler_config(HUNYUAN_DIT.scheduler({"use_style_cond_and_image_meta_size": sized}))
        assert (process.kind, process.prediction, process.sampler.solver) == ("noise", "v_prediction", "ddpm")
        assert process.sampler.variance == "fixed_small"  # the pipeline drops the learned one
        ends[sized] = process.beta_end
    assert ends == {True: 0.03, False: 0.018}
