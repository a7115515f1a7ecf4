"""The model card: what training logged and what the judge says of data, reconstructions and samples, as measured."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dit_export.demo import data, losses, score, store
from dit_runtime.files import write_file

# guidance, steps; the third is the demo's default
SETTINGS = ((1.0, 25), (2.0, 25), (4.0, 25), (8.0, 25), (4.0, 10), (4.0, 50))

CARD = """\
# The demo model

A class-conditional DiT with its autoencoder and a judge, trained from nothing on what `dit_export/demo/data.py` draws:
a {shapes}, in {colours},
at a random place, size and angle on a muted background, 64×64 pixels.
It exists so that every claim of quality in this project can be checked on a model that was really trained; it is good
for nothing else. There are no third-party data or weights in it. Licence: Apache-2.0, as the project's.

Made by `dit-export demo train` (seed {seed}, {pictures:,} pictures), {minutes} minutes of wall time in all,
on {machine}.
`training.json` has the same figures for machines.

| part | network | parameters | steps × batch | minutes | last loss |
|---|---|---|---|---|---|
{parts}

Files are float16 ({megabytes:.1f} MB in all) and are read as float32; every figure here is of the stored weights.

* Autoencoder: scaling factor {scaling} (measured: 1 / deviation of the latents); {psnr} dB on {held_out:,} held-out
  pictures; the judge names {reconstructed:.1%} of the reconstructions rightly.
* Judge: {judged:.2%} on {held_out:,} held-out pictures.
* DiT: diffusers' dialect, adaLN-Zero, learned variance, linear 1000-step schedule, 10 % of labels dropped,
  L_hybrid of Improved DDPM on timesteps whose logit is normal around t = 400, Muon for the blocks' matrices and AdamW
  for the rest, averaged weights (EMA {ema}).

## Scores

{count} pictures a row, balanced over the {classes} classes, seed 0, DPM-Solver++(2M), PyTorch in float32.
Agreement: how often the judge names the asked class, with Wilson's 95 % interval. Fréchet distance: on the judge's
features, to {reference} held-out pictures, ± 1.96 bootstrap deviations; comparable within this table only.

| pictures | agreement | Fréchet distance |
|---|---|---|
{scores}
"""


def write(folder: Path = store.MODEL, count: int = 1_000, reference: int = score.REFERENCE, machine: str = "") -> None:
    """Measure the table and write MODEL_CARD.md beside the weights; `machine` says what training ran on."""
    figures = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    demo = store.load(folder)
    names = {"autoencoder": "AutoencoderKL", "refined": "the same, after a warm restart", "judge": "ViT", "dit": "DiT"}
    parts = [figures[part] for part in names]
    card = CARD.format(
        shapes=" or ".join([", ".join(list(data.SHAPES)[:-1]), list(data.SHAPES)[-1]]),
        colours=" or ".join([", ".join(list(data.COLOURS)[:-1]), list(data.COLOURS)[-1]]),
        seed=figures["seed"],
        pictures=figures["pictures"],
        minutes=round(sum(part["seconds"] for part in parts) / 60),
        machine=machine or f"{os.cpu_count()} CPU cores with PyTorch {torch.__version__}",
        parts="\n".join(
            f"| {part} | {name} | {row['parameters']:,} | {row['steps']:,} × {row['batch']} "
            f"| {row['seconds'] / 60:.0f} | {row['loss']} |"
            for (part, name), row in zip(names.items(), parts, strict=True)
        ),
        megabytes=sum(path.stat().st_size for path in folder.glob("*/*.safetensors")) / 1e6,
        scaling=figures["refined"]["scaling_factor"],
        psnr=figures["refined"]["held_out_psnr"],
        reconstructed=figures["refined"]["judge_on_reconstructions"],
        judged=figures["judge"]["held_out_accuracy"],
        held_out=figures["held_out"],
        ema=figures["dit"]["ema"],
        count=f"{count:,}",
        classes=len(data.CLASSES),
        reference=f"{reference:,}",
        scores="\n".join(
            f"| {name} | {row.accuracy:.3f} | {row.frechet:.3f} |"
            for name, row in table(demo, count, reference).items()
        ),
    )
    write_file(folder / "MODEL_CARD.md", card)


def table(demo: store.Demo, count: int, reference: int) -> dict[str, score.Score]:
    """Scores of new data (the floor), of their reconstructions, and of samples by guidance and steps."""
    held_out = score.reference_features(demo.judge, reference)
    fresh = data.pool(data.VALIDATION, count)
    labels = score.balanced_labels(count)
    rows = {"data": [fresh.images], "reconstructions": reconstructions(demo, fresh)}
    rows |= {
        f"guidance {guidance:g}, {steps} steps": score.draw(demo, labels, steps, guidance)
        for guidance, steps in SETTINGS
    }
    return {name: score.score(pictures, labels, demo.judge, held_out) for name, pictures in rows.items()}


@torch.no_grad()
def reconstructions(demo: store.Demo, samples: data.Samples) -> Iterator[NDArray[np.uint8]]:
    for chunk in torch.arange(len(samples.labels)).split(100):
        latents = demo.vae.encode(losses.pictures(samples, chunk)).latent_dist.mean
        yield score.decode(demo, latents * demo.vae.config.scaling_factor)
