"""`dit-export demo show-sr`: enlarge pictures from 16 to 64 pixels, and score them and bicubic ones with the judge."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_export.bundle.build import build
from dit_export.demo import data, low, score, store
from dit_export.demo.low import Pictures
from dit_export.demo.run import BATCH, PRECISIONS, REFERENCE, present
from dit_export.recipe import Recipe
from dit_export.verify.check import Built
from dit_runtime import images
from dit_runtime.files import beside
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.verify import Figure

CALIBRATION = 60  # training pictures whose latents int8 is calibrated with
CONDITIONS = "demo-sr-conditions.npz"  # beside the bundles
COLUMNS = 2  # examples in a line of the grid
AGREEMENT = 0.97  # least, of the judge with the true class
FRECHET = 0.5  # most, as a share of the bicubic pictures' distance


@dataclass(frozen=True)
class Row:
    """One way to make the large pictures: the judge's score of them, and their mean PSNR in dB to the true ones."""

    score: score.Score
    psnr: float


@dataclass(frozen=True)
class Shown:
    built: dict[str, Built]  # by the bundle's name, demo-sr-int8
    rows: dict[str, Row]  # of the true, the bicubic and each bundle's pictures
    grid: Path  # each example in four: low, bicubic, the last bundle's, true

    @property
    def verdict(self) -> list[Figure]:
        """Return what each bundle's pictures must keep to."""
        bicubic = self.rows["bicubic"].score.frechet.value
        figures = []
        for name in self.built:
            measured = self.rows[name].score
            share = measured.frechet.value / bicubic
            figures.append(Figure(name, "judge's agreement, share", measured.accuracy.value, AGREEMENT, at_least=True))
            figures.append(Figure(name, "Fréchet distance, share of bicubic's", share, FRECHET))
        return figures

    @property
    def passed(self) -> bool:
        return all(built.passed for built in self.built.values()) and all(figure.passed for figure in self.verdict)


def show(weights: Path | None, folder: Path, count: int, progress: Progress) -> Shown:
    """Build and verify a bundle in each precision, enlarge `count` unseen pictures, and put a grid of some beside."""
    weights = present(weights, store.SR)
    demo = store.load(weights, store.SR)
    real = score.reference_features(demo.judge, REFERENCE)
    folder.mkdir(parents=True, exist_ok=True)
    truth = data.pool(data.VALIDATION, count)
    small = low.shrink(truth.images)
    pictures = {"true": truth.images, "bicubic": low.enlarge(small)}
    own = low.condition(demo.vae, low.shrink(data.pool(data.TRAIN, CALIBRATION).images))
    with beside(folder / CONDITIONS) as partial:
        np.savez(partial, low=own.numpy())
    built = {}
    for precision in PRECISIONS:
        name = f"demo-sr-{precision}"
        recipe = Recipe(
            checkpoint=str(weights / store.SR),
            vae=str(weights),
            precision=precision,
            conditions=str(folder / CONDITIONS) if precision == "int8" else None,
            encoder=True,
            max_batch=BATCH,
            output=str(folder / name),
        )
        built[name] = build(recipe, progress)
        with progress.stage(f"{name}: {count} pictures"), Pipeline.load(built[name].folder) as pipe:
            pictures[name] = pipe.sample(image=pictures["bicubic"], seed=1)
    judged = {}
    for name, each in pictures.items():
        with progress.stage(f"{name} before the judge"):
            measured = score.score(
                np.array_split(each, -(-count // low.CHUNK)), truth.labels.tolist(), demo.judge, real
            )
            judged[name] = Row(measured, mean_psnr(each, truth.images))
    grid = folder / "demo-sr-grid.png"
    images.write_png(grid, sheet(small, pictures["bicubic"], pictures[name], truth.images))
    return Shown(built, judged, grid)


def mean_psnr(pictures: Pictures, truth: Pictures) -> float:
    """Return the mean over the pictures, in dB; 100 dB stands for equal ones."""
    return float(np.mean([min(images.psnr(*pair), 100.0) for pair in zip(pictures, truth, strict=True)]))


def sheet(small: Pictures, *large: Pictures) -> Pictures:
    """Return the grid: an example of each class, as its small picture in blocks of pixels and the large ones."""
    blocks = small.repeat(low.FACTOR, axis=1).repeat(low.FACTOR, axis=2)
    examples = np.stack([blocks, *large], axis=1)[: len(data.CLASSES)]  # (N, 4, H, W, 3)
    return images.grid(examples.reshape(-1, *blocks.shape[1:]), COLUMNS * examples.shape[1])


def to_dict(shown: Shown) -> dict[str, Any]:
    rows = {name: asdict(row) for name, row in shown.rows.items()}
    verdict = [figure.to_dict() for figure in shown.verdict]
    return {"passed": shown.passed, "rows": rows, "verdict": verdict}


def table(rows: dict[str, Row]) -> str:
    lines = [f"{'':<14} {'agreement':<24} {'Fréchet distance':<24} PSNR in dB"]
    lines += [
        f"{name:<14} {f'{row.score.accuracy:.3f}':<24} {f'{row.score.frechet:.3f}':<24} {row.psnr:.2f}"
        for name, row in rows.items()
    ]
    return "\n".join(lines)
