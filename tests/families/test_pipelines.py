"""`dit-export build --pipeline`: transformers without a family, and the latents of a family where there is one."""

from __future__ import annotations

import inspect
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensor

from dit_export.bundle.inputs import NO_INPUTS, with_prompts
from dit_export.checkpoints import Loaded, load
from dit_export.checkpoints.pipelines import read_pipeline
from dit_export.cli import main as export
from dit_export.recipe import Recipe
from dit_runtime import Pipeline, UsageError
from dit_runtime.bundle import manifest
from dit_runtime.progress import Progress
from tests.families import pipelines, tiny
from tests.families.pipelines import GUIDANCE, SEED, STEPS, Case, build
from tests.families.test_flux import T5_TOKENS
from tests.families.test_flux import make_pipeline as flux_pipeline
from tests.families.test_sd3 import make_pipeline as sd3_pipeline

INT8 = 20.0  # dB of latents


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> Case:
    pipeline = pipelines.hunyuan_dit()
    with one_thread():
        bundle = build(pipeline, tmp_path_factory.mktemp("hunyuan"))
    return Case(pipeline, bundle, {"use_resolution_binning": False})


def test_a_pipeline_without_a_family(case) -> None:
    pipelines.accept(case)


def test_its_pictures(case) -> None:
    """Its VAE is a known one, and draws what the pipeline draws."""
    expected = case.theirs(output_type="np")
    with Pipeline.load(case.bundle, threads=1) as pipe:
        got = np.moveaxis(pipe.engines.decode(case.ours()), 1, -1)
    assert min(tiny.distances(got, expected)) >= tiny.SAME


def test_what_its_manifest_says(case) -> None:
    contract = manifest.read(case.bundle)
    assert {port.name: port.masks for port in contract.conditions} == {
        "encoder_hidden_states": "",
        "text_embedding_mask": "encoder_hidden_states",
        "encoder_hidden_states_t5": "",
        "text_embedding_mask_t5": "encoder_hidden_states_t5",
    }
    assert contract.guidance.default == 5.0 and contract.process.sampler.steps == 50
    assert {"conditions.npz", "negative.npz"} <= contract.files.keys()
    assert contract.source["kind"] == "pipeline" and "sha256" in contract.source["vae"]


def test_conditions_of_other_prompts(case, tmp_path, capsys) -> None:
    """Recorded by the pipeline, they draw what it draws."""
    file, words = tmp_path / "own.npz", "two dogs"
    command = ["conditions", str(case.bundle), "--prompt", words, pipelines.PROMPT, "--negative", "blurry"]
    assert export([*command, "-o", str(file)]) == 0
    away = tmp_path / "own-negative.npz"
    assert f"--condition {file} --negative-condition {away}" in capsys.readouterr().out
    own, negative = (dict(np.load(path).items()) for path in (file, away))
    options: dict[str, Any] = {"guidance": GUIDANCE, "steps": STEPS, "output": "latents"}
    with Pipeline.load(case.bundle, threads=1) as pipe:
        got = pipe.sample(condition=own, negative=negative, seed=[SEED, SEED + 1], **options)
    expected = case.theirs([words, pipelines.PROMPT], [SEED, SEED + 1], negative_prompt=["blurry"] * 2)
    assert pipelines.distance(got, expected) >= tiny.SAME
    assert pipelines.distance(case.ours(), expected[1:]) < tiny.ANOTHER  # with the empty negative, and another seed


REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "encoder_hidden_states has the shape [1, 6, 64] for one prompt and [1, 43, 64] for another: a data-dependent": (
        pipelines.latte,
        {"frames": 2},
    ),
    "timestep of shape [1, 32] changes from step to step and is a time of its own for each token": (
        lambda: pipelines.wan(expand_timesteps=True),
        {"frames": 5},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(tmp_path, one_thread, message) -> None:
    make, options = REFUSED[message]
    make().save_pretrained(tmp_path)
    with one_thread(), pytest.raises(UsageError) as error:
        read_pipeline(tmp_path, Recipe(resolution=64, **options))
    assert message in str(error.value)


def test_code_in_a_folder_does_not_run(tmp_path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": "MyTransformer"}))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": ["pipeline", "MyPipeline"]}))
    (tmp_path / "pipeline.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass MyPipeline: pass\n")
    with pytest.raises(UsageError, match=r"has no class .*MyPipeline"):
        read_pipeline(tmp_path, Recipe())
    assert not (tmp_path / "ran").exists()


def test_a_lora_beside_the_weights(tmp_path) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(UsageError, match="a LoRA beside the weights"):
        load(Recipe(pipeline=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "frames", "shape"),
    [
        (pipelines.wan, 5, (4, 2, 8, 8)),
        (pipelines.cogvideox, 9, (3, 4, 8, 8)),
        (pipelines.cogview3, None, (4, 8, 8)),
    ],
)
def test_other_classes(tmp_path, one_thread, make, frames, shape) -> None:
    pipeline = make()
    with one_thread():
        bundle = build(pipeline, tmp_path, frames=frames)
    assert manifest.read(bundle).state.shape == shape
    pipelines.accept(Case(pipeline, bundle, {"num_frames": frames} if frames else {}))


HUNYUAN: dict[str, Any] = {"use_resolution_binning": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "call", "recipe", "least"),
    [
        (pipelines.hunyuan_dit, HUNYUAN, {"backend": "openvino"}, tiny.SAME),
        (pipelines.hunyuan_dit, HUNYUAN, {"precision": "int8"}, INT8),
        (pipelines.cogview3, {}, {"precision": "int8", "backend": "openvino"}, INT8),
        (pipelines.wan, {"num_frames": 5}, {"precision": "int8"}, INT8),
    ],
)
def test_backends_and_precisions(tmp_path, one_thread, make, call, recipe, least) -> None:
    pipeline = make()
    with one_thread():
        case = Case(pipeline, build(pipeline, tmp_path, frames=call.get("num_frames"), **recipe), call)
        expected = case.theirs()
        got = pipelines.distance(case.ours(), expected)
        assert got >= least
        for other in (case.ours(slice(1, 2)), case.ours(seed=SEED + 9)):
            assert pipelines.distance(other, expected) < got - 6
    if recipe.get("precision") == "int8":
        assert got < tiny.SAME and manifest.read(case.bundle).built_with["quantized"] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "call", "backend"),
    [(pipelines.hunyuan_dit, HUNYUAN, "onnxruntime"), (pipelines.wan, {"num_frames": 5}, "openvino")],
)
def test_several_sizes(tmp_path, one_thread, make, call, backend) -> None:
    """Each draws what the pipeline draws at it, from the same conditions."""
    pipeline, sizes = make(), [64, "64x96"]
    with one_thread():
        bundle = build(pipeline, tmp_path, frames=call.get("num_frames"), resolution=sizes, backend=backend)
        for size, width in (("64", 64), ("64x96", 96)):
            pipelines.accept(Case(pipeline, bundle, {**call, "width": width}, size))
    assert manifest.read(bundle).size_names == ("64", "64x96")


def test_the_module_of_flux(tmp_path, one_thread) -> None:
    """Packed latents, a dynamic shift and embedded guidance: the same bits as the family's."""
    flux_pipeline(use_dynamic_shifting=True, shift=3.0).save_pretrained(tmp_path)
    sizes: dict[str, Any] = {"resolution": 64, "caption_tokens": T5_TOKENS}
    with one_thread(), torch.no_grad():
        read = read_pipeline(tmp_path, Recipe(**sizes))
        family = load(Recipe(checkpoint=str(tmp_path), without_text_encoders=True, **sizes))
        arrays = {name: torch.from_numpy(rows) for name, rows in read.examples["conditions"].items()}
        state, time, weight = (
            torch.randn(2, *read.network.state.shape),
            torch.tensor([0.9, 0.3]),
            torch.tensor([3.0, 5]),
        )
        got = read.network.module(hidden_states=state, timestep=time, guidance_scale=weight, **arrays)
        captions, pooled = (arrays[name] for name in ("encoder_hidden_states", "pooled_projections"))
        words = {"captions": captions, "pooled": pooled, "guidance_scale": weight}
        assert torch.equal(got, family.network.module(latents=state, timesteps=time, **words))
    assert read.process.shift == family.process.shift != 1 and read.vae is not None
    assert all(isinstance(weight, FakeTensor) for weight in read.network.module.transformer.proj_out.parameters())
    assert read.network.weights.keys() >= {name for name, _ in read.network.module.named_parameters()}
    assert read.network.guidance_port == family.network.guidance_port
    loaded = Loaded(read.network, None, (), read.process, {}, examples=read.examples)
    inputs = with_prompts(NO_INPUTS, Recipe(precision="int8"), loaded, Progress(io.StringIO()))
    assert inputs.prompts is not None  # int8 is calibrated with what was recorded
    for name, rows in (read.examples["conditions"] | {"guidance_scale": np.full(2, 3.5)}).items():
        np.testing.assert_array_equal(inputs.prompts.condition[name], rows)


@pytest.mark.slow
def test_a_part_that_reads_the_weights_of_another(tmp_path, one_thread, monkeypatch) -> None:
    """They are not there when they are read, so all weights stay in memory."""
    right = FluxTransformer2DModel.forward

    def reads_more(self: Any, **inputs: Any) -> tuple[torch.Tensor]:
        return (right(self, **inputs)[0] * (1 + 0 * self.proj_out.weight.sum()),)

    reads_more.__signature__ = inspect.signature(right)  # type: ignore[attr-defined]
    monkeypatch.setattr(FluxTransformer2DModel, "forward", reads_more)
    flux_pipeline(shift=3.0).save_pretrained(tmp_path)
    with one_thread():
        network = read_pipeline(tmp_path, Recipe(resolution=64, caption_tokens=T5_TOKENS)).network
    assert network.weights == {}
    assert not any(isinstance(weight, FakeTensor) for weight in network.module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("make", "tokens"), [(sd3_pipeline, 256), (flux_pipeline, T5_TOKENS)])
def test_the_same_as_a_family(tmp_path, one_thread, make, tokens) -> None:
    """Both doors draw the same latents from the same embeddings; the generic one has names of its own."""
    pipeline = make()
    names = {"encoder_hidden_states": "captions", "pooled_projections": "pooled"}
    with one_thread():
        generic = build(pipeline, tmp_path, caption_tokens=tokens)
        captions = manifest.read(generic).port("encoder_hidden_states").shape[0]
        recipe = {"caption_tokens": captions, "resolution": 64, "without_text_encoders": True}
        family = tiny.build(pipeline, tmp_path / "family", **recipe)
    case = Case(pipeline, generic, {"max_sequence_length": tokens})
    pipelines.accept(case)
    options: dict[str, Any] = {"seed": SEED, "guidance": GUIDANCE, "steps": STEPS, "output": "latents"}
    arrays = dict(np.load(generic / "conditions.npz").items())
    condition = {ours: arrays[theirs][:1] for theirs, ours in names.items()}
    if (generic / "negative.npz").exists():
        away = dict(np.load(generic / "negative.npz").items())
        options["negative"] = {ours: away[theirs] for theirs, ours in names.items()}
    with Pipeline.load(family, threads=1) as pipe:
        assert pipelines.distance(case.ours(), pipe.sample(condition=condition, **options)) >= tiny.SAME
