"""`dit-export demo show | score | judge`: bundles of the trained weights, grids of samples, the judge's verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_export.bundle.build import build
from dit_export.demo import data, score, store
from dit_export.demo.score import Score
from dit_export.demo.vit import ViT
from dit_export.graph import trace
from dit_export.recipe import Recipe
from dit_export.verify import report
from dit_export.verify.check import Built
from dit_export.verify.distribution import fit
from dit_runtime import images
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from dit_runtime.files import beside
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress

FOLDER = Path("engines/build")
PRECISIONS = ("fp32", "int8")
JUDGE = "demo-judge.onnx"  # beside the bundles, each of which has a copy
PRESETS = "presets.json"  # beside the weights, where they were tuned
COLUMNS = 8  # pictures of each class in the grid
SHEET, SHEET_COLUMNS = 40, 10  # pictures in the report: two of each class
STEPS, GUIDANCE = 25, 4.0
BATCH = 50
REFERENCE = 2_000  # held-out pictures for the quick score; `demo score` takes score.REFERENCE


@dataclass(frozen=True)
class Shown:
    name: str  # demo-int8
    built: Built
    grid: Path
    score: Score


def demo(weights: Path | None, folder: Path, count: int, progress: Progress) -> list[Shown]:
    """Builds and verifies a bundle in each precision, scores `count` pictures, and puts a grid of some beside it."""
    weights = present(weights)
    judge = store.load_judge(weights)
    real = score.reference_features(judge, REFERENCE)
    folder.mkdir(parents=True, exist_ok=True)
    export_judge(weights, folder / JUDGE)
    mu, sigma = fit(real)
    with beside((folder / JUDGE).with_suffix(".npz")) as partial:
        np.savez(partial, mu=mu, sigma=sigma)
    labels, classes = score.balanced_labels(count), len(data.CLASSES)
    columns = min(COLUMNS, count // classes)
    by_class = [column * classes + label for label in range(classes) for column in range(columns)]
    shown, sheets = [], []
    for precision in PRECISIONS:
        name = f"demo-{precision}"
        recipe = Recipe(
            checkpoint=str(weights),
            precision=precision,
            max_batch=BATCH,
            judge=str(folder / JUDGE),
            presets=str(weights / PRESETS) if (weights / PRESETS).is_file() else None,
            output=str(folder / name),
        )
        built = build(recipe, progress)
        grid = built.folder.with_name(f"{built.folder.name}-grid.png")
        with progress.stage(f"{name}: {count} pictures before the judge"), Pipeline.load(built.folder) as pipe:
            pictures = sample(pipe, labels, seed=1)
            result = score.score([pictures], labels, judge, real)
        images.write_png(grid, images.grid(pictures[by_class], columns))
        shown.append(Shown(name, built, grid, result))
        sheets.append(report.Exhibit(f"{name}: {_said(result)}", images.grid(pictures[:SHEET], SHEET_COLUMNS)))
    for sheet in shown:
        page = report.page(sheet.name, manifest.read(sheet.built.folder), sheet.built)
        report.write(sheet.built.folder / report.NAME, sheet.built.folder, replace(page, exhibits=sheets))
    return shown


def _said(result: Score) -> str:
    return f"the judge agrees with {result.accuracy.value:.1%} of {result.pictures}, Fréchet {result.frechet.value:.2f}"


def sample(pipe: Pipeline, labels: Sequence[int], seed: int) -> NDArray[np.uint8]:
    pictures: NDArray[np.uint8] = pipe.sample(labels, steps=STEPS, guidance=GUIDANCE, seed=seed)
    return pictures


def score_bundle(pipe: Pipeline, judge: ViT, count: int, reference: score.Floats) -> Score:
    labels = score.balanced_labels(count)
    return score.score([sample(pipe, labels, seed=1)], labels, judge, reference)


def present(weights: Path | None, part: str = "") -> Path:
    """Return the folder of the weights; refuse one without them, or without those of a part."""
    folder = weights or store.MODEL
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"{folder}: no demo weights here; make them with `dit-export demo train FOLDER`")
    if not (folder / part / "transformer" / "config.json").is_file():
        raise UsageError(f"{folder}: no weights of {part} here; make them with `dit-export demo train-sr {folder}`")
    return folder


def compare(weights: Path | None, folder: Path, count: int, progress: Progress) -> dict[str, Score]:
    """The bundle's score, and PyTorch's of the same seeds, labels and solver."""
    models = store.load(present(weights))
    reference = score.reference_features(models.judge)
    labels = score.balanced_labels(count)
    with Pipeline.load(folder) as pipe, progress.stage(f"score: {count} pictures by {folder.name}"):
        ours = score_bundle(pipe, models.judge, count, reference)
    with progress.stage(f"score: {count} pictures by PyTorch"):
        theirs = score.score(
            score.draw(models, labels, STEPS, GUIDANCE, seed=1, batch=BATCH), labels, models.judge, reference
        )
    return {"bundle": ours, "PyTorch": theirs}


def export_judge(weights: Path | None, path: Path) -> None:
    """The judge as ONNX, `images` in [0, 1] -> `logits`, `features`, for scoring without PyTorch."""
    judge = store.load_judge(present(weights))
    side = judge.spec.image_size
    trace.export(judge, {"images": torch.zeros(2, 3, side, side)}, ["logits", "features"]).save(path)


def table(scores: dict[str, Score]) -> str:
    lines = [f"{'':<10} {'agreement':<24} Fréchet distance"]
    lines += [f"{name:<10} {f'{row.accuracy:.3f}':<24} {row.frechet:.3f}" for name, row in scores.items()]
    return "\n".join(lines)


def to_dict(scores: dict[str, Score]) -> dict[str, Any]:
    return {name: asdict(row) for name, row in scores.items()}
