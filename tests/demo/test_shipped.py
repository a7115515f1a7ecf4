"""The weights that ship: what the model card claims, seen again on fewer pictures, and a score that can fall."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from dit_export.bundle.build import build
from dit_export.bundle.presets import read_presets
from dit_export.checkpoints import keys
from dit_export.checkpoints.meta import read_file
from dit_export.demo import data, run, score, store
from dit_export.demo.train import accuracy
from dit_export.networks.dit import DiT
from dit_export.recipe import Recipe
from dit_export.tune import gate, plans, trial
from dit_export.verify.distribution import fit
from dit_export.verify.features import OnnxJudge
from dit_runtime import images
from dit_runtime.bundle import manifest
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.request import Request
from dit_runtime.verify import load_reference
from tests.demo.test_demo import compare_with_diffusers

COUNT = 200  # pictures a score


@pytest.fixture(scope="module")
def shipped() -> store.Demo:
    return store.load()


@pytest.fixture(scope="module")
def reference(shipped: store.Demo) -> score.Floats:
    return score.reference_features(shipped.judge, 1_000)


@pytest.fixture(scope="module")
def drawn(shipped: store.Demo, reference: score.Floats) -> score.Score:
    """PyTorch's pictures, scored."""
    labels = score.balanced_labels(COUNT)
    pictures = score.draw(shipped, labels, run.STEPS, run.GUIDANCE, seed=1, batch=50)
    return score.score(pictures, labels, shipped.judge, reference)


def score_of(bundle: Path, demo: store.Demo, reference: score.Floats) -> score.Score:
    with Pipeline.load(bundle) as pipe:
        return run.score_bundle(pipe, demo.judge, COUNT, reference)


BAD = {"cache": "taylorseer", "cache_interval": 5, "max_order": 2, "disable_cache_before_step": 0}


def test_the_tuner_refuses_a_plan_that_guesses_too_far(
    demo_fp32: Path, reference: score.Floats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parabolas over five steps, from the first step on: the judge sees other shapes, few rows notwithstanding."""
    monkeypatch.setattr(trial, "NEAR", 8)
    run.export_judge(None, tmp_path / "judge.onnx")
    with Pipeline.load(demo_fp32) as pipe:
        judge = OnnxJudge(tmp_path / "judge.onnx")
        trying = trial.Trial(pipe, load_reference(demo_fp32, pipe.manifest), judge, fit(reference), lambda *_: None)
        usual, block = plans.default(pipe.manifest), trial.Block(0, 100)
        scores = {"usual": trying(usual, block), "bad": trying({**usual, **BAD}, block)}
        assert scores["bad"].rows < 0.5 * scores["usual"].rows
        limits = gate.JUDGED["fast"]
        (best, _), (worst, verdict) = gate.ranked("fast", limits, scores, scores["usual"], trying.unrelated)
    assert (best, worst) == ("usual", "bad")
    failed = {figure.metric for figure in verdict if not figure.passed}
    assert {"Fréchet distance", "judge's agreement, share"} <= failed, scores


ROWS = {"balanced": 20, "fast": 14}  # at most


def test_its_presets_are_what_was_accepted(demo_fp32: Path) -> None:
    presets = read_presets(store.MODEL / run.PRESETS, manifest.read(demo_fp32).process)
    assert presets.keys() == {"balanced", "fast"}
    with Pipeline.load(demo_fp32) as pipe:
        wide = replace(pipe.manifest, presets=presets)
        for name, preset in presets.items():
            limits, measured = gate.JUDGED[name]._replace(rows=ROWS[name]), preset["measured"]
            base = {figure: measured["default"][figure] for figure in gate.Score._fields}
            scores = {name: gate.Score(*(measured[figure] for figure in gate.Score._fields))}
            (_, verdict), *_ = gate.ranked(name, limits, scores, gate.Score(**base), unrelated=0.0)
            assert all(figure.passed for figure in verdict), verdict
            plan = replace(Request("red circle", preset=name).with_preset(wide), preset=None)
            assert pipe.run(plan).planned_rows == measured["rows"]
            assert pipe.run(Request("red circle")).planned_rows == base["rows"]


def test_they_are_small() -> None:
    files = [path for path in store.MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}


def test_diffusers_reads_the_same_network(shipped: store.Demo) -> None:
    assert compare_with_diffusers(shipped.dit, store.MODEL) < 1e-5  # float32 rounding of two orders of summation


def test_metas_names_hold_the_same_network(shipped: store.Demo, tmp_path: Path) -> None:
    torch.save(keys.write(shipped.dit, keys.META), tmp_path / "demo.pt")
    again = read_file(tmp_path / "demo.pt", Recipe(heads=shipped.dit.spec.heads))
    theirs, ours = dict(again.named_parameters()), dict(shipped.dit.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert again.spec.frequency_shift != shipped.dit.spec.frequency_shift  # the same weights, another dialect


def test_the_judge_knows_what_it_has_not_seen(shipped: store.Demo) -> None:
    assert accuracy(shipped.judge, data.pool(data.HELD_OUT, 400)) >= 0.985


def test_a_bundle_scores_as_pytorch_and_a_broken_one_worse(
    shipped: store.Demo, demo_fp32: Path, reference: score.Floats, drawn: score.Score, tmp_path: Path
) -> None:
    sound = score_of(demo_fp32, shipped, reference)
    assert sound.accuracy.low <= drawn.accuracy.value <= sound.accuracy.high
    assert sound.frechet.low <= drawn.frechet.value <= sound.frechet.high
    assert sound.accuracy.value >= 0.965  # the card's 1,000 pictures say 0.995; six deviations of 200 are 0.03

    bundle = Path(shutil.copytree(demo_fp32, tmp_path / "bundle"))
    swap_gain_and_shift(bundle, block=2)
    broken = score_of(bundle, shipped, reference)
    assert broken.accuracy.high < sound.accuracy.low
    assert broken.frechet.low > sound.frechet.high  # measured 30 and 0.4, each ± 5


def swap_gain_and_shift(bundle: Path, block: int) -> None:
    """In one block's attention, and sealed again: nothing but the pictures can tell."""
    contract = manifest.read(bundle)
    path = bundle / contract.step.files[0]
    model = onnx.load(path, load_external_data=False)
    (split,) = [node for node in model.graph.node if node.input[0] == "conditioning_rows"]
    first = 6 * block
    split.output[first], split.output[first + 1] = split.output[first + 1], split.output[first]
    onnx.save(model, path)
    manifest.write(bundle, replace(contract, files=manifest.describe_files(bundle)))


def test_the_card_says_what_the_log_says() -> None:
    card = (store.MODEL / "MODEL_CARD.md").read_text(encoding="utf-8")
    figures = json.loads((store.MODEL / "training.json").read_text(encoding="utf-8"))
    for part in ("autoencoder", "refined", "judge", "dit"):
        assert f"{figures[part]['parameters']:,}" in card and f"{figures[part]['steps']:,}" in card
    assert figures["judge"]["held_out_accuracy"] >= 0.99


def test_unasked_and_asked_differ(shipped: store.Demo, reference: score.Floats, drawn: score.Score) -> None:
    """Guidance moves the scores as theory says: more agreement than without it."""
    labels = score.balanced_labels(COUNT)
    weak = score.score(score.draw(shipped, labels, run.STEPS, 1.0, seed=1), labels, shipped.judge, reference)
    assert drawn.accuracy.value > weak.accuracy.value
    assert np.isfinite(weak.frechet.value)


def test_a_dit_of_other_weights_is_told_apart(shipped: store.Demo, tmp_path: Path) -> None:
    other = DiT(shipped.dit.spec).eval()
    other.load_state_dict(shipped.dit.state_dict())
    with torch.no_grad():
        other.blocks[0].attn.proj.weight.mul_(1.01)
    assert compare_with_diffusers(other, store.MODEL) > 1e-5


@pytest.mark.slow
def test_a_round_trip(tmp_path: Path) -> None:
    """Encoder and decoder keep what the card says of the autoencoder; a picture of another seed is another one."""
    folder = tmp_path / "bundle"
    recipe = Recipe(checkpoint=str(store.MODEL), encoder=True, backend="onnxruntime", output=str(folder))
    assert build(recipe, Progress()).passed
    pictures, others = (data.pool(seed, 100)[0] for seed in (77, 78))
    with Pipeline.load(folder, threads=1) as pipe:
        latents = pipe.engines.encode_pictures(images.to_unit(pictures))["mean"]
        again = images.to_uint8(pipe.engines.decode(latents))
    assert images.psnr(pictures, again) >= 29 > images.psnr(others, again)
