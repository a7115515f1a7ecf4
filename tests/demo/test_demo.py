"""The demo: its data set, its training loop, its folder and its scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, DPMSolverMultistepScheduler

from dit_export.checkpoints.diffusers import read_process, read_transformer
from dit_export.checkpoints.labels import pipeline_labels
from dit_export.demo import card, data, losses, score, store, train
from dit_export.demo.loop import Stage, fit
from dit_export.demo.vit import ViTSpec
from dit_export.networks.dit import DiT
from dit_runtime.errors import UsageError

TINY = train.Plan(
    pictures=40,
    held_out=20,
    channels=(8, 8, 8, 8),
    spec=store.demo_spec(depth=2, hidden=32, heads=2, patch=2),
    vit=ViTSpec(len(data.CLASSES), hidden=32, depth=1, heads=1),
    autoencoder=Stage("autoencoder", steps=2, batch=4, rate=1e-3, warmup=1),
    refined=Stage("refined", steps=2, batch=4, rate=1e-3, warmup=1),
    judge=Stage("judge", steps=2, batch=4, rate=1e-3, warmup=1),
    dit=Stage("dit", steps=6, batch=8, rate=1e-3, warmup=2),
)


def random_dit() -> DiT:
    """Random enough that every weight matters: adaLN-Zero's zeros would hide a mapping mistake."""
    torch.manual_seed(0)
    return DiT(TINY.spec).eval()


def rounded(dit: DiT) -> DiT:
    """Round the weights to values that float16 holds exactly, like those of a stored folder."""
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.copy_(parameter.half().float())
    return dit


# The data set


def test_a_sample_depends_on_its_seed_and_index_alone() -> None:
    alone = data.batch(3, [41]).images[0]
    assert np.array_equal(alone, data.batch(3, [7, 41, 2]).images[1])
    assert np.array_equal(alone, data.pool(3, 100).images[41])
    assert not np.array_equal(alone, data.batch(4, [41]).images[0])
    assert alone.shape == (64, 64, 3) and alone.dtype == np.uint8


def test_classes_are_balanced_and_pictures_differ() -> None:
    samples = data.pool(data.TRAIN, 400)
    assert np.bincount(samples.labels).tolist() == [20] * len(data.CLASSES)
    assert len({image.tobytes() for image in samples.images}) == 400


def test_seeds_and_indices_draw_even_numbers() -> None:
    u = data.uniforms(0, np.arange(4000), 8)
    assert u.min() >= 0 and u.max() < 1
    # the standard error of a mean is 0.29 / sqrt(4000) = 0.0046, of a correlation 1 / sqrt(4000) = 0.016: five of each
    assert np.abs(u.mean(0) - 0.5).max() < 0.023
    assert np.abs(np.corrcoef(u.T) - np.eye(8)).max() < 0.08


def test_the_shape_has_its_colour() -> None:
    samples = data.pool(data.HELD_OUT, 40)
    for image, label in zip(samples.images.astype(float), samples.labels, strict=True):
        colour = np.array(data.COLOURS[data.CLASSES[label].split()[0]])
        near = (np.abs(image - colour).max(-1) < 30).mean()  # jitter is ±12 and shading ±10 %
        assert near > 0.03, data.CLASSES[label]


# Training


def test_a_stage_resumes_to_the_bit(tmp_path: Path) -> None:
    samples = torch.randn(64, 4)

    def loss(module: torch.nn.ModuleDict, generator: torch.Generator) -> torch.Tensor:
        return module["blocks"](samples[torch.randint(64, (8,), generator=generator)]).square().mean()

    def fresh() -> torch.nn.ModuleDict:
        torch.manual_seed(1)
        return torch.nn.ModuleDict({"blocks": torch.nn.Linear(4, 4)})

    stage = Stage("line", steps=10, batch=8, rate=0.1, warmup=2, muon=True)  # the weight's; the bias is AdamW's
    whole = fit(fresh(), loss, stage, 0, tmp_path / "whole", every=3).module
    calls = 0

    def interrupted(module: torch.nn.ModuleDict, generator: torch.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return loss(module, generator)

    with pytest.raises(KeyboardInterrupt):
        fit(fresh(), interrupted, stage, 0, tmp_path / "parts", every=3)
    resumed = fit(fresh(), loss, stage, 0, tmp_path / "parts", every=3).module
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    other = fit(fresh(), loss, stage, 1, tmp_path / "seed", every=3).module
    assert not torch.equal(whole["blocks"].weight, other["blocks"].weight)
    with pytest.raises(UsageError, match="other settings"):
        fit(fresh(), loss, replace(stage, rate=0.2), 0, tmp_path / "whole")


def test_training_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train.train(tmp_path / "whole", plan=TINY, checkpoints=tmp_path / "a")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(losses, "diffusion_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(tmp_path / "parts", plan=TINY, checkpoints=tmp_path / "b")
    train.train(tmp_path / "parts", plan=TINY, checkpoints=tmp_path / "b")
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


def test_the_model_card_says_what_was_measured(tmp_path: Path) -> None:
    train.train(tmp_path / "model", plan=TINY, checkpoints=tmp_path / "checkpoints")
    card.write(tmp_path / "model", count=20, reference=40)
    figures = json.loads((tmp_path / "model" / "training.json").read_text(encoding="utf-8"))
    text = (tmp_path / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"{figures['judge']['held_out_accuracy']:.2%} on 20 held-out pictures" in text
    assert f"scaling factor {figures['refined']['scaling_factor']} " in text
    assert text.count(" steps | ") == len(card.SETTINGS)


def test_the_loss_is_that_of_improved_ddpm() -> None:
    """Against the bound written out with q's and p's means, for one t, with a network that says something."""
    dit, bar = random_dit(), losses.alphas_bar()
    t, eps_generator = 400, torch.Generator().manual_seed(5)
    moments = torch.cat([torch.randn(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)], dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "timesteps", lambda count, generator: torch.full((count,), t))
        patch.setattr(torch, "randint", lambda high, size, generator: torch.zeros(size, dtype=torch.long))
        patch.setattr(torch, "rand", lambda count, generator: torch.ones(count))  # nothing dropped
        value = losses.diffusion_loss(moments, 1, labels=(torch.tensor([3]), 20))(dit, eps_generator)
    again = torch.Generator().manual_seed(5)
    torch.randn(1, 4, 8, 8, generator=again)
    epsilon = torch.randn(1, 4, 8, 8, generator=again).double()
    x0 = moments[:, :4].double()
    xt = bar[t].sqrt() * x0 + (1 - bar[t]).sqrt() * epsilon
    out = dit(xt.float(), torch.tensor([float(t)]), torch.tensor([3])).double()
    prediction, v = out.chunk(2, dim=1)
    alpha = bar[t] / bar[t - 1]
    beta = 1 - alpha

    def posterior_mean(x: torch.Tensor) -> torch.Tensor:
        return (bar[t - 1].sqrt() * beta * x + alpha.sqrt() * (1 - bar[t - 1]) * xt) / (1 - bar[t])

    guess = (xt - (1 - bar[t]).sqrt() * prediction) / bar[t].sqrt()
    q_var = beta * (1 - bar[t - 1]) / (1 - bar[t])
    p_var = torch.exp((v + 1) / 2 * beta.log() + (1 - v) / 2 * q_var.log())
    gap = posterior_mean(x0) - posterior_mean(guess)
    bound = 0.5 * (p_var.log() - q_var.log() + (q_var + gap**2) / p_var - 1).mean()
    expected = (epsilon - prediction).square().mean() + bound
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)  # float32 tables: beta and 1 - bar lose digits


def test_timesteps_are_spread_around_those_that_decide_shapes() -> None:
    t = losses.timesteps(20_000, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() < losses.STEPS
    assert 380 < t.float().median() < 420  # 1000 / (1 + exp(0.4)) is 401
    assert 0.85 < ((t >= 100) & (t < 800)).float().mean() < 0.88  # of the normal: 0.865
    assert (t < 20).any() and (t > 980).any()


def test_adaln_zero_starts_as_zero() -> None:
    dit = train.zero_initialised(DiT(TINY.spec))
    assert not dit(torch.randn(2, 4, 8, 8), torch.tensor([1.0, 900.0]), torch.tensor([0, 20])).any()


# The folder


def compare_with_diffusers(dit: DiT, folder: Path) -> float:
    """Relative distance between our DiT and diffusers' own reading of the folder."""
    theirs = DiTTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval()
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 431.5, 999.0]), torch.tensor([0, 7, 20])
    with torch.no_grad():
        ours, reference = dit(x, t, y), theirs(x, timestep=t, class_labels=y).sample
    return ((ours - reference).norm() / reference.norm()).item()


def test_a_saved_transformer_is_the_same_in_diffusers(tmp_path: Path) -> None:
    dit = rounded(random_dit())
    store.save_transformer(dit, tmp_path)
    assert compare_with_diffusers(dit, tmp_path) < 1e-5  # float32 rounding of two orders of summation
    assert compare_with_diffusers(read_transformer(tmp_path / "transformer")[0], tmp_path) < 1e-5
    with torch.no_grad():
        dit.blocks[1].mlp.fc2.weight *= 1.05
    assert compare_with_diffusers(dit, tmp_path) > 1e-4


def test_the_toolchain_reads_a_saved_folder(tmp_path: Path) -> None:
    store.save_transformer(random_dit(), tmp_path)
    store.save_index(tmp_path)
    dit, _ = read_transformer(tmp_path / "transformer")
    assert dit.spec == TINY.spec
    assert pipeline_labels(tmp_path, 20) == data.CLASSES
    diffusion = read_process(tmp_path, learned_variance=True)
    assert (diffusion.beta_start, diffusion.beta_end, diffusion.prediction) == (1e-4, 0.02, "epsilon")


# The sampler


def test_the_sampler_steps_as_diffusers_does() -> None:
    demo = store.Demo(random_dit(), train.autoencoder(TINY.channels).eval(), None)  # type: ignore[arg-type]
    demo.vae.register_to_config(scaling_factor=1.0)
    labels = [3, 11]
    (images,) = score.draw(demo, labels, steps=6, guidance=3.0, seed=9)
    scheduler = DPMSolverMultistepScheduler.from_config(store.SCHEDULER)
    scheduler.set_timesteps(6)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    for t in scheduler.timesteps:
        with torch.no_grad():
            epsilon = score.guided(demo, x, float(t), torch.tensor(labels), 3.0)
        x = scheduler.step(epsilon, t, x).prev_sample
    expected = score.decode(demo, x).astype(int)
    assert np.abs(images - expected).max() <= 1  # one grey level: a rounding that fell the other way
    assert np.abs(next(score.draw(demo, labels, steps=7, guidance=3.0, seed=9)) - expected).max() > 1
