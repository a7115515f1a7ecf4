"""Super-resolution on the demo: its pictures, its training, the weights that ship, and the judge's verdict."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

from dit_export.bundle.build import build
from dit_export.cli import main
from dit_export.cli.console import sample_command
from dit_export.demo import data, losses, low, run, score, store, train, train_sr
from dit_export.demo.loop import Stage
from dit_export.networks.dit import DiT
from dit_export.recipe import Recipe
from dit_runtime import images
from dit_runtime.errors import UsageError
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from tests.demo.test_demo import TINY, random_dit, rounded

PLAN = train_sr.Plan(pictures=20, blocks=(1,), stage=Stage("sr", steps=3, batch=4, rate=1e-3, warmup=1))
STEPS = 4


def test_a_small_pixel_is_the_mean_of_its_cell() -> None:
    picture = data.pool(data.HELD_OUT, 1).images
    small = low.shrink(picture)
    assert small.shape == (1, 16, 16, 3)
    assert np.array_equal(small[0, 5, 2], np.rint(picture[0, 20:24, 8:12].mean((0, 1))))


def test_training_starts_from_the_network_of_the_null_label() -> None:
    dit = random_dit()
    new = train_sr.started(dit, (0, 1)).eval()
    x, t, picture = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0]), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = dit(x, t, torch.tensor([20, 20]))
        assert torch.allclose(new(x, t, low=picture), expected, atol=1e-5)
        assert not torch.allclose(new(x, t, low=picture), dit(x, t, torch.tensor([20, 3])), atol=1e-3)
        new.patches.weight[:, 4:].normal_(0, 0.1)
        assert not torch.allclose(new(x, t, low=picture), expected, atol=1e-3)


def test_dropped_conditions_are_the_constant() -> None:
    dropped = torch.tensor([True, False, True])
    pictures, labels = torch.ones(3, 2, 4, 4), torch.tensor([3, 4, 5])
    assert losses.without(pictures, dropped, 0.0).mean((1, 2, 3)).tolist() == [0, 1, 0]
    replaced = losses.without(labels, dropped, 20)
    assert replaced.tolist() == [20, 4, 20] and replaced.dtype == torch.int64


def test_it_trains_into_the_demos_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    store.save_transformer(DiT(TINY.spec), tmp_path)
    store.save_vae(train.autoencoder(TINY.channels), tmp_path)
    store.save_judge(store.load_judge(), tmp_path)
    store.save_index(tmp_path)
    with pytest.raises(
        UsageError, match=f"no weights of sr here; make them with `dit-export demo train-sr {tmp_path}`"
    ):
        run.present(tmp_path, store.SR)
    train_sr.train(tmp_path / store.SR, tmp_path, plan=PLAN, checkpoints=tmp_path / "checkpoints")
    dit = store.load(run.present(tmp_path, store.SR), store.SR).dit
    assert (dit.spec.depth, dit.spec.num_classes, dit.spec.low_channels) == (1, 0, 4)
    assert dit.patches.weight[:, 4:].abs().min() > 0  # the picture's channels were trained, from zero
    figures = json.loads((tmp_path / store.SR / "training.json").read_text(encoding="utf-8"))
    assert figures["dit"]["steps"] == 3 and figures["pictures"] == 20


def test_diffusers_reads_the_same_network(tmp_path: Path) -> None:
    """Its class ignores `low_channels`, and takes the state and the picture as one."""
    torch.manual_seed(0)
    spec = replace(TINY.spec, num_classes=0, low_channels=4)
    dit = rounded(DiT(spec).eval())
    store.save_transformer(dit, tmp_path)
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.float32).eval()
    x, t, picture = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0]), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        both, zero = torch.cat([x, picture], dim=1), torch.zeros(2, dtype=torch.int64)
        expected = theirs(both, timestep=t, class_labels=zero).sample
        assert torch.allclose(dit(x, t, low=picture), expected, atol=1e-4)
        assert not torch.allclose(dit(x, t, low=picture.flip(0)), expected, atol=1e-2)


# The weights that ship


@pytest.fixture(scope="module")
def shipped() -> store.Demo:
    return store.load(part=store.SR)


def test_a_bundle_draws_pytorchs_pictures_and_the_small_picture_matters(shipped: store.Demo, tmp_path: Path) -> None:
    recipe = Recipe(
        checkpoint=str(store.MODEL / store.SR),
        vae=str(store.MODEL),
        encoder=True,
        backend="onnxruntime",
        output=str(tmp_path / "sr"),
    )
    built = build(recipe, Progress())
    assert built.passed and built.sensitive
    truth = data.pool(data.VALIDATION, 4).images
    small = low.shrink(truth)
    rows, large = low.condition(shipped.vae, small), low.enlarge(small)
    (expected,) = score.enlarge(shipped, rows, STEPS, seed=1)
    with Pipeline.load(built.folder) as pipe:
        (port,) = pipe.manifest.conditions
        assert port.name == "low" and port.picture and pipe.manifest.null == {"low": 0}
        assert pipe.manifest.guidance.default == 1

        def draw(condition: torch.Tensor | None = None, **options: Any) -> np.ndarray:
            own = None if condition is None else {"low": condition.numpy()}
            return pipe.sample(condition=own, steps=STEPS, seed=1, **options)

        drawn = draw(rows)
        assert images.psnr(drawn, expected) >= 55  # the limit of fp32 bundles
        assert images.psnr(drawn, truth) > 25 > images.psnr(draw(rows.roll(1, 0)), truth)
        # Away from the picture of zeros, which training put in the place of dropped ones: no negative is asked for.
        assert images.psnr(draw(rows, guidance=1.5), drawn) < 50
        assert images.psnr(draw(image=large), drawn) >= 55
        assert images.psnr(draw(image=large[0]), drawn[:1]) >= 55
        assert pipe.sample(image=large[0], steps=1, seed=[1, 2, 3]).shape == (3, 64, 64, 3)  # each of the one picture
        assert sample_command(built.folder, pipe.manifest).endswith(f"sample {built.folder} --image SMALL.png")
        with pytest.raises(UsageError, match="got both an image and a condition with low: pass one of them"):
            draw(rows, image=large)
        with pytest.raises(UsageError, match="no image for low; pass one"):
            draw()
        for option in ("strength", "mask"):
            with pytest.raises(UsageError, match=f"got {option}, but this bundle takes the image as low"):
                draw(image=large, **{option: 0.5})


@pytest.mark.slow
def test_the_judge_prefers_it_to_bicubic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`pytest -s -m slow tests/demo/test_sr.py` prints the table; 2,000 pictures, about four minutes."""
    code = main(["demo", "show-sr", "-o", str(tmp_path), "--count", "2000", "--json"])
    shown = json.loads(capsys.readouterr().out)
    print(json.dumps(shown, indent=1))
    assert code == 0 and len(shown["verdict"]) == 4
    assert (tmp_path / "demo-sr-grid.png").read_bytes().startswith(b"\x89PNG")
    psnr = {name: row["psnr"] for name, row in shown["rows"].items()}
    assert psnr["true"] == 100 and min(psnr["demo-sr-fp32"], psnr["demo-sr-int8"]) > psnr["bicubic"] + 1
