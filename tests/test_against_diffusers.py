"""Pictures of a bundle against diffusers' own DiTPipeline with the same folder; no code of the exporter is used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler

from dit_runtime import Pipeline
from dit_runtime.conditions.labels import class_number

STEPS = 10
# uint8 pictures of two fp32 programs; one level of 255 wrong everywhere would be 48 dB, so this allows a rounding tie
# in every second pixel and no more. Measured: 72 to 95 dB, a few values in a thousand off by one.
LEAST_DB = 50.0
OTHER_DB = 30.0  # what another label's picture must stay below; measured: 9 to 20 dB
SCHEDULERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
BATCHES = {1: [207], 3: [207, 3, 999]}


@pytest.fixture(scope="module", params=["own_embedders", "shared_embedders"])
def both(request, one_thread):
    """The same folder opened by diffusers and, as a bundle, by the runtime."""
    built = request.getfixturevalue(request.param)
    pipeline = DiTPipeline.from_pretrained(built.checkpoint, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.saved = pipeline.scheduler
    with one_thread(), Pipeline.load(built.bundle, threads=1) as bundle:
        yield pipeline, bundle


def theirs(pipeline: DiTPipeline, solver: str, labels: list[int], guidance: float, seed: int, steps: int = STEPS):
    """As diffusers' documentation says to change the scheduler, with a CPU generator; latents are not clipped."""
    pipeline.scheduler = SCHEDULERS[solver].from_config({**pipeline.saved.config, "clip_sample": False})
    pictures = pipeline(
        class_labels=labels,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
        num_inference_steps=steps,
        output_type="np",
    ).images
    return np.rint(pictures.astype(np.float64) * 255)


def db(first, second) -> float:
    error = np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("count", BATCHES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_same_seed_same_picture(both, solver, guidance, count):
    pipeline, bundle = both
    labels = BATCHES[count]
    expected = theirs(pipeline, solver, labels, guidance, seed=42)
    got = bundle.sample(labels, steps=STEPS, guidance=guidance, seed=42, solver=solver)
    assert got.shape == expected.shape and got.dtype == np.uint8
    for picture, reference in zip(got, expected, strict=True):
        assert reference.std() > 10  # a flat picture would agree with anything
        assert db(picture, reference) >= LEAST_DB


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_another_label_seed_or_guidance_is_another_picture(both, solver, guidance):
    """Without this the test above could pass on weights that hear neither label nor guidance."""
    pipeline, bundle = both
    expected = theirs(pipeline, solver, [207], guidance, seed=42)
    for labels, strength, seed in (([208], guidance, 42), ([207], 5 - guidance, 42), ([207], guidance, 43)):
        got = bundle.sample(labels, steps=STEPS, guidance=strength, seed=seed, solver=solver)
        assert db(got, expected) < OTHER_DB


def test_the_usual_call_of_diffusers(both):
    """DPM-Solver++, 25 steps, guidance 4.0: from 15 steps on, its last steps are of full order."""
    pipeline, bundle = both
    expected = theirs(pipeline, "dpm++", [360], 4.0, seed=33, steps=25)
    got = bundle.sample([360], steps=25, guidance=4.0, seed=33, solver="dpm++")
    assert db(got, expected) >= LEAST_DB


def test_the_folders_scheduler_is_the_default(both):
    """No solver named: the one that scheduler_config.json names, as in the folder's own pipeline."""
    pipeline, bundle = both
    name = next(name for name, kind in SCHEDULERS.items() if isinstance(pipeline.saved, kind))
    expected = theirs(pipeline, name, [360], 4.0, seed=7)
    assert db(bundle.sample([360], steps=STEPS, guidance=4.0, seed=7), expected) >= LEAST_DB


def test_class_names_of_the_folder(shared_embedders):
    """diffusers splits id2label at commas: each synonym is a name."""
    pipeline = DiTPipeline.from_pretrained(shared_embedders.checkpoint, low_cpu_mem_usage=False)
    words = ["golden retriever", "otter", "river dog", "item 12"]
    with Pipeline.load(shared_embedders.bundle, threads=1) as bundle:
        ids = [class_number(word, bundle.manifest.labels, bundle.manifest.classes) for word in words]
        assert ids == pipeline.get_label_ids(words) == [207, 360, 360, 12]
