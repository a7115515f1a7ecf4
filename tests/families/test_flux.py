"""FLUX.1 from prompts, CLIP and T5: dev with embedded guidance, schnell with none of its own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline

from dit_export.cli import main as regress
from dit_export.networks.families import family_network
from dit_runtime import Pipeline, Request, verify
from dit_runtime.bundle import manifest
from dit_runtime.cli import main as run_command
from dit_runtime.errors import UsageError
from dit_runtime.serve import Batcher
from tests import tamper
from tests.families import editing, tiny
from tests.families.elsewhere import Elsewhere
from tests.networks.tiny import TOKENS, distance, flux, inputs, run

JOINT, SINGLE, T5_TOKENS = 2, 1, 32
WIDE, SQUARE = "64x96", "64"


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


def make_case(
    pipeline: FluxPipeline, folder: Any, resolution: Any = WIDE, encoder: bool = False, **fields: Any
) -> tiny.Case:
    bundle = tiny.build(pipeline, folder, caption_tokens=T5_TOKENS, resolution=resolution, encoder=encoder)
    return tiny.Case(pipeline, bundle, {"height": 64, "width": 96, "max_sequence_length": T5_TOKENS}, **fields)


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> tiny.Case:
    pipeline = make_pipeline(shift=3.0, use_dynamic_shifting=True)
    with one_thread():
        return make_case(pipeline, tmp_path_factory.mktemp("flux"), [WIDE, 64], negative=None)


@pytest.fixture(scope="module")
def square(case) -> tiny.Case:
    """The same bundle at its second size, at which shift and rotary tables are others."""
    return replace(case, call={**case.call, "width": 64}, size=SQUARE)


def test_a_prompt_is_diffusers(case) -> None:
    tiny.accept(case)


class TestElsewhere(Elsewhere):
    """On OpenVINO, without PyTorch, in C++."""


def test_another_size_is_diffusers(square) -> None:
    tiny.accept(square)


def test_openvino_draws_it(case, square, tmp_path) -> None:
    folder = tiny.on_backend("openvino", case.bundle, tmp_path / "bundle")
    for own in (case, square):
        moved, expected = replace(own, bundle=folder), own.theirs()
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


@pytest.mark.slow
def test_true_guidance_is_diffusers(tmp_path, one_thread) -> None:
    """dev with its embedded weight frozen: a negative prompt leads away, by the weight of two predictions."""
    pipeline = make_pipeline(shift=3.0, use_dynamic_shifting=True)
    call = {"height": 64, "width": 96, "max_sequence_length": T5_TOKENS, "guidance_scale": 2.0}
    with one_thread():
        options = {"caption_tokens": T5_TOKENS, "resolution": WIDE, "embedded_guidance": 2.0}
        bundle = tiny.build(pipeline, tmp_path, **options)
        case = tiny.Case(pipeline, bundle, call, weight="true_cfg_scale")
        tiny.accept(case)
        other = replace(case, call=call | {"guidance_scale": 4.0})
        assert max(tiny.distances(case.ours(), other.theirs())) < tiny.ANOTHER
    contract = manifest.read(bundle)
    assert contract.mixes_guidance and not contract.guidance.port and contract.guidance.default == 1.0


@pytest.fixture(scope="module")
def editable(tmp_path_factory, one_thread) -> dict[str, tiny.Case]:
    """Cases by the pipeline's name for guidance: an input of the network, and a weight of two predictions."""
    folder, shift = tmp_path_factory.mktemp("editable"), {"shift": 3.0, "use_dynamic_shifting": True}
    with one_thread():
        dev = make_case(make_pipeline(**shift), folder / "dev", encoder=True, negative=None)
        schnell = make_pipeline(embedded=False, shift=1.0)
        return {
            "guidance_scale": dev,
            "true_cfg_scale": make_case(schnell, folder / "schnell", encoder=True, weight="true_cfg_scale"),
        }


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["image", "inpainting"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("weight", "guidance"), [("guidance_scale", 3.0), ("true_cfg_scale", 1.0), ("true_cfg_scale", 3.0)]
)
def test_from_pictures(editable, masked, count, weight, guidance) -> None:
    edit = editing.Edit(editable[weight], editing.Pipelines(FluxImg2ImgPipeline, FluxInpaintPipeline), masked)
    for strength in (0.3, 0.6, 0.9):
        assert edit.distance(strength=strength, guidance=guidance, count=count) >= editing.SAME, strength
    if count == 1:
        editing.accept(edit, strength=0.6, guidance=guidance, count=count)


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


def test_what_both_have_in_common_stands_once(case) -> None:
    contract = manifest.read(case.bundle)
    assert contract.size_names == (WIDE, SQUARE)
    other = contract.at(SQUARE)
    same = {stage.name for stage in contract.stages} & {stage.name for stage in other.stages}
    assert same == {"prompt", "context", "modulation", "conditioner"} & {stage.name for stage in contract.stages}
    assert contract.process != other.process  # the shift counts the tokens
    for own, first in ((other.step, contract.step), (other.end, contract.end)):
        assert own.name == f"{first.name}-{SQUARE}" and f"{first.onnx}.data" in own.shared
        sizes = [contract.files[f"{stage.onnx}.data"].size for stage in (own, first)]
        assert sizes[0] < 0.1 * sizes[1], own.name


def test_one_pipeline_draws_both(case, square) -> None:
    """Engines that sizes share open once; low memory opens one at a time; noise has the size's shape."""
    options = {"prompt": tiny.PROMPT, "steps": 2, "seed": 5, "guidance": 2.0}
    with Pipeline.load(case.bundle, threads=1) as pipe:
        first = pipe.sample(**options)
        assert pipe.at(SQUARE).manifest.step.name not in pipe.engines.opened
        second = pipe.sample(size=64, **options)
        assert (first.shape, second.shape) == ((1, 64, 96, 3), (1, 64, 64, 3))
        assert np.array_equal(pipe.at("64x64").sample(**options), second)
        assert np.array_equal(pipe.sample(**options), first)
        assert len({id(engine) for engine in pipe.engines.opened.values()}) == len(pipe.engines.opened)
    with Pipeline.load(case.bundle, threads=1, size=SQUARE, low_memory=True) as pipe:
        assert np.array_equal(pipe.sample(**options), second)
        assert np.array_equal(pipe.sample(size=WIDE, **options), first) and len(pipe.engines.opened) == 1


def test_a_batcher_draws_both(case) -> None:
    """Images of one size share calls; each is the one that is drawn alone."""
    requests = [
        Request(prompt=tiny.PROMPT, steps=3, seed=seed, guidance=2.0, size=size)
        for seed, size in enumerate((None, SQUARE, WIDE, SQUARE, None))
    ]
    with Pipeline.load(case.bundle, threads=1) as pipe:
        alone = [pipe.run(request).result() for request in requests]
    batcher = Batcher(Pipeline.load(case.bundle, threads=1), places=2)
    tickets = [batcher.submit(request) for request in requests]
    for ticket, expected in zip(tickets, alone, strict=True):
        difference = np.abs(ticket.result(60).astype(int) - expected)
        assert difference.max() <= (0 if batcher.pipe.manifest.batch_invariant else 1)
    batcher.close()
    assert batcher.counts["samples"] == 15 > batcher.counts["calls"]
    assert set(batcher.sizes) == {WIDE, SQUARE} and batcher.sizes[WIDE].weight == 1


def test_a_size_that_is_not_there(case, capsys) -> None:
    words = f"size 128 is not in this bundle; it has {WIDE}, {SQUARE}"
    with pytest.raises(UsageError, match=words):
        Request(size=128).check(manifest.read(case.bundle))
    with pytest.raises(UsageError, match=words):
        Pipeline.load(case.bundle, size="128x128")
    assert run_command(["sample", str(case.bundle), "--prompt", "a cat", "--size", "128"]) == 2
    assert words in capsys.readouterr().err


def test_each_size_is_verified(case, capsys) -> None:
    """The figures of a size stand behind its name, and an error of one size's graph is that size's."""
    assert run_command(["verify", str(case.bundle)]) == 0
    assert f"{SQUARE}: denoiser-{SQUARE}: prediction, rel-L2" in capsys.readouterr().out
    contract = manifest.read(case.bundle)
    shifted = replace(contract.at(SQUARE), process=contract.process).at(WIDE)
    with Pipeline.load(case.bundle, threads=1) as pipe:
        pipe.engines.manifest = shifted
        failed = [figure.name for figure in verify.verify(pipe) if not figure.passed]
    assert failed and all(name.startswith(f"{SQUARE}: ") for name in failed)
    assert [bool(figures) for figures in verify.by_size(contract, []).values()] == [False, False]


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (tamper.swap_streams, "denoiser: prediction, rel-L2"),
        (lambda bundle: tamper.shift_tables(bundle, T5_TOKENS + 24), "denoiser: prediction, rel-L2"),
        (tamper.shift_schedule, "sampler: timesteps that differ"),
    ],
    ids=["streams", "tables", "schedule"],
)
def test_the_gate_names_what_is_broken(case, tmp_path, capsys, break_it, named) -> None:
    bundle = Path(shutil.copytree(case.bundle, tmp_path / "bundle"))
    break_it(bundle)
    assert regress(["regress", str(bundle)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED ")]
    assert failed[0].startswith(f"FAILED {named}"), failed
