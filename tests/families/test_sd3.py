"""Stable Diffusion 3.5 from prompts, by two CLIPs and T5, and from embeddings; static and dynamic shift."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)

from dit_export.cli import main as regress
from dit_runtime import Pipeline, UsageError
from dit_runtime.bundle import manifest
from dit_runtime.cli import main as run
from tests import tamper
from tests.families import editing, tiny
from tests.families.elsewhere import Elsewhere
from tests.networks.tiny import SD3_5, sd3

T5_TOKENS, WIDTH, POOLED, BLOCKS, SIDE = 32, 64, 48, 3, 8
CALL = {"height": 64, "width": 64, "max_sequence_length": T5_TOKENS}


def make_pipeline(with_t5: bool = True, **scheduler: Any) -> StableDiffusion3Pipeline:
    clip, t5 = tiny.clip_tokenizer(), tiny.t5_tokenizer()
    widths = {"joint_attention_dim": WIDTH, "pooled_projection_dim": POOLED}
    return StableDiffusion3Pipeline(
        transformer=sd3(**SD3_5, **widths, num_layers=BLOCKS, sample_size=SIDE),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
        vae=tiny.vae(),
        text_encoder=tiny.clip(clip, eos_token_id=2),  # as the public CLIP-L says; it pools at the largest id
        tokenizer=clip,
        text_encoder_2=tiny.clip(clip, seed=1),
        tokenizer_2=clip,
        text_encoder_3=tiny.t5(t5) if with_t5 else None,
        tokenizer_3=t5 if with_t5 else None,
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory, one_thread) -> tiny.Case:
    pipeline = make_pipeline()
    with one_thread():
        bundle = tiny.build(pipeline, tmp_path_factory.mktemp("sd3"), caption_tokens=77 + T5_TOKENS, encoder=True)
    return tiny.Case(pipeline, bundle, CALL)


def test_a_prompt_is_diffusers(case) -> None:
    tiny.accept(case)


class TestElsewhere(Elsewhere):
    """On OpenVINO, without PyTorch, in C++."""


def test_a_negative_prompt(case) -> None:
    """Another is another picture; none is the empty one, as in the pipeline."""
    expected = case.theirs()
    assert max(tiny.distances(case.ours(negative_prompt="a dog"), expected)) < tiny.ANOTHER
    empty = replace(case, negative=None)
    assert min(tiny.distances(empty.ours(), empty.theirs())) >= tiny.SAME
    assert max(tiny.distances(empty.ours(), expected)) < tiny.ANOTHER


PIPELINES = editing.Pipelines(StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline)


@pytest.mark.parametrize("masked", [False, True], ids=["image", "inpainting"])
def test_from_a_picture(case, masked) -> None:
    editing.accept(editing.Edit(case, PIPELINES, masked), strength=0.6, count=2)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["image", "inpainting"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("guidance", [1.0, tiny.GUIDANCE])
@pytest.mark.parametrize("strength", [0.3, 0.6, 0.9])
def test_from_pictures(case, masked, count, guidance, strength) -> None:
    edit = editing.Edit(case, PIPELINES, masked)
    assert edit.distance(strength=strength, guidance=guidance, count=count) >= editing.SAME


def test_a_prompt_that_clip_cuts(case) -> None:
    """T5 takes the whole of it, so it is drawn as the pipeline does; one that T5 cuts too is refused."""
    long, longer = (("the " * count,) for count in (30, 35))
    expected = case.theirs(long)
    assert min(tiny.distances(case.ours(long), expected)) >= tiny.SAME
    changed = (long[0].removeprefix("the"),)
    assert max(tiny.distances(case.ours(changed), expected)) < tiny.ANOTHER
    with pytest.raises(UsageError, match=r"too long: it has 107 of at most 77, 107 of at most 77, 36 of at most 32"):
        case.ours(longer)


# Draws from words where importing what made the bundle fails.
CHILD = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "diffusers", "dit_export", "onnx", "huggingface_hub"):
            raise ModuleNotFoundError(f"blocked: {name}")
sys.meta_path.insert(0, Blocker())
import numpy
from dit_runtime import Pipeline
with Pipeline.load(sys.argv[1], threads=1, low_memory=True) as pipe:
    options = {"steps": 2, "guidance": 3.0, "seed": 1, "output": "latents"}
    numpy.save(sys.argv[2], pipe.sample(prompt="a photo of a cat", negative_prompt="blurry", **options))
"""


def test_without_what_made_it(case, tmp_path) -> None:
    """Neither PyTorch nor transformers is there, and one stage at a time is open."""
    out = tmp_path / "latents.npy"
    command = [sys.executable, "-c", CHILD, str(case.bundle), str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    options = {"steps": 2, "guidance": 3.0, "seed": 1, "output": "latents"}
    with Pipeline.load(case.bundle, threads=1) as pipe:
        expected = pipe.sample(prompt="a photo of a cat", negative_prompt="blurry", **options)
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-5)


def test_the_build_checks_the_encoders(case) -> None:
    """Each condition port at 1, 2 and 3 prompts, and that another prompt would be seen."""
    checks = json.loads((case.bundle / "parity.json").read_text())["checks"]
    prompt = {(check["metric"], check["where"]) for check in checks if check["stage"] == "prompt"}
    for port in ("captions", "pooled"):
        assert {(f"{port} at a batch, rel-L2", f"batch {count}") for count in (1, 2, 3)} <= prompt
        assert (f"{port} of another prompt, rel-L2", "") in prompt


def test_the_target_checks_the_encoders(case, tmp_path, capsys) -> None:
    """Without PyTorch: projections of each port; other weights fail."""
    assert run(["verify", str(case.bundle), "--threads", "1", "--json"]) == 0
    checks = {check["metric"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert {f"{port} of ids, fingerprint, rel-L2" for port in ("captions", "pooled")} <= checks
    bundle = Path(shutil.copytree(case.bundle, tmp_path / "bundle"))
    graph = onnx.load(bundle / "prompt.onnxruntime.onnx", load_external_data=False)
    (weight,) = [tensor for tensor in graph.graph.initializer if tensor.name.endswith("clips.1.text_projection.weight")]
    offset = next(int(entry.value) for entry in weight.external_data if entry.key == "offset")
    data = bytearray((bundle / "prompt.onnx.data").read_bytes())
    values = np.frombuffer(data, np.float32, POOLED // 2, offset)
    values *= 1.01
    (bundle / "prompt.onnx.data").write_bytes(data)
    contract = manifest.read(bundle)
    manifest.write(bundle, replace(contract, files=manifest.describe_files(bundle)))
    assert run(["verify", str(bundle), "--threads", "1", "--json"]) == 1
    failed = [check["metric"] for check in json.loads(capsys.readouterr().out)["checks"] if not check["passed"]]
    assert failed == ["pooled of ids, fingerprint, rel-L2"]


def embeddings(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    captions, pooled = random.normal(size=(1, 77 + T5_TOKENS, WIDTH)), random.normal(size=(1, POOLED))
    return {"captions": captions.astype(np.float32), "pooled": pooled.astype(np.float32)}


def from_embeddings(pipeline: Any, own: dict[str, np.ndarray], negative: dict[str, np.ndarray], **options: Any) -> Any:
    """Return the latents of the pipeline's run."""
    arrays = {}
    for sign, condition in (("", own), ("negative_", negative)):
        arrays[f"{sign}prompt_embeds"] = torch.from_numpy(condition["captions"])
        arrays[f"{sign}pooled_prompt_embeds"] = torch.from_numpy(condition["pooled"])
    fixed = {"num_inference_steps": tiny.STEPS, "guidance_scale": tiny.GUIDANCE, "output_type": "latent"}
    generator = torch.Generator().manual_seed(tiny.SEED)
    return pipeline(**arrays, **fixed, **options, height=64, width=64, generator=generator).images.numpy()


LATENTS = {"steps": tiny.STEPS, "output": "latents", "seed": tiny.SEED, "guidance": tiny.GUIDANCE}


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_embeddings_are_diffusers(case) -> None:
    """Each port takes part; a bundle with encoders takes what these would give, too."""
    own, negative, other = (embeddings(seed) for seed in range(3))
    expected = from_embeddings(case.pipeline, own, negative)
    with Pipeline.load(case.bundle, threads=1) as pipe:
        got = pipe.sample(condition=own, negative=negative, **LATENTS)
        assert distance(got, expected) <= 1e-4  # fp32 sums in another order, four guided steps long
        for changed in ({"condition": own | {"pooled": other["pooled"]}}, {"negative": other}):
            request = {"condition": own, "negative": negative} | LATENTS | changed
            assert distance(pipe.sample(**request), expected) > 0.01, changed.keys()


def test_dynamic_shift(tmp_path, one_thread) -> None:
    """The shift follows from the count of image tokens, which a bundle's size settles."""
    pipeline = make_pipeline(use_dynamic_shifting=True)
    options = {"latents_only": True, "without_text_encoders": True, "max_batch": 1}
    with one_thread():
        bundle = tiny.build(pipeline, tmp_path, caption_tokens=77 + T5_TOKENS, **options)
    contract = manifest.read(bundle)
    assert contract.prompts == () and contract.prompt is None
    own, negative = embeddings(0), embeddings(1)
    mu = pipeline.scheduler.config.base_shift + ((SIDE // 2) ** 2 - 256) * (1.15 - 0.5) / (4096 - 256)
    with Pipeline.load(bundle, threads=1) as pipe:
        got = pipe.sample(condition=own, negative=negative, **LATENTS)
    assert distance(got, from_embeddings(pipeline, own, negative, mu=mu)) <= 1e-4
    assert distance(got, from_embeddings(pipeline, own, negative, mu=mu + 0.1)) > 1e-3


def test_what_leaves_the_loop(case) -> None:
    """Each block's modulation leaves: 6 vectors a stream, 9 with dual attention, 2 in the last text stream and at the
    end. What depends on text and time stays: nothing with tokens is made every step."""
    contract = manifest.read(case.bundle)
    stages = {stage.name: stage for stage in contract.stages}
    timed = [tensor for stage in contract.stages if stage.runs.startswith("time") for tensor in stage.gives]
    assert sum(tensor.shape[1] for tensor in timed) == 12 * BLOCKS - 2 + 3 * 1
    assert all(len(tensor.shape) == 3 for tensor in timed)
    assert contract.stages[0].runs == "prompt"
    assert [stage.runs for stage in contract.stages][-3:] == ["step", "update", "end"]
    assert "captions" not in {tensor.name for tensor in stages["denoiser"].reads}


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "precision"), [("openvino", "fp32"), ("openvino", "int8")])
def test_other_forms(case, tmp_path, one_thread, backend, precision) -> None:
    """The encoders are computed in fp32, by ONNX Runtime on a CPU, and draw from words in every form of a bundle."""
    with one_thread():
        recipe = {"backend": backend, "precision": precision, "caption_tokens": 77 + T5_TOKENS}
        bundle = tiny.build(case.pipeline, tmp_path, **recipe)
    stage = manifest.read(bundle).prompt
    assert (stage.precision, stage.backend) == ("fp32", "onnxruntime")
    least = {"fp32": tiny.SAME, "int8": 15.0}[precision]
    assert min(tiny.distances(replace(case, bundle=bundle).ours(), case.theirs())) >= least


@pytest.mark.slow
def test_without_t5(tmp_path, one_thread) -> None:
    """The pipeline has zeros in the place of its captions."""
    pipeline = make_pipeline(with_t5=False)
    with one_thread():
        bundle = tiny.build(pipeline, tmp_path, caption_tokens=77 + T5_TOKENS, max_batch=1)
    case = tiny.Case(pipeline, bundle, CALL)
    assert [prompt.ids for prompt in manifest.read(bundle).prompts] == ["ids", "ids_2"]
    expected = case.theirs()
    assert min(tiny.distances(case.ours(), expected)) >= tiny.SAME
    assert max(tiny.distances(case.ours((tiny.OTHER,)), expected)) < tiny.ANOTHER


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (tamper.swap_streams, "denoiser: prediction, rel-L2"),
        (lambda bundle: tamper.shift_tables(bundle, (SIDE // 2) ** 2), "denoiser: prediction, rel-L2"),
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
