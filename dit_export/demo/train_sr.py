"""`dit-export demo train-sr`: a DiT that draws 64 pixels from 16, started from the demo's own."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch.nn.functional as F

from dit_export.demo import data, losses, low, store
from dit_export.demo.loop import Stage, fit
from dit_export.demo.train import cached, say, stage_figures
from dit_export.networks.dit import DiT
from dit_runtime.files import write_file


@dataclass(frozen=True)
class Plan:
    pictures: int
    blocks: tuple[int, ...]  # of the demo's DiT: these four have the least loss of all four before any training
    stage: Stage


PLAN = Plan(
    pictures=20_000,
    blocks=(0, 2, 5, 6),
    stage=Stage("sr", steps=5_000, batch=64, rate=1.5e-3, warmup=200, muon=True),
)


def train(
    output: Path,
    weights: Path = store.MODEL,
    seed: int = 0,
    resume: bool = True,
    plan: Plan = PLAN,
    checkpoints: Path = Path("build/demo-sr"),
) -> None:
    """Train from the weights of the demo in `weights`, into a folder of diffusers' layout; resume where it stopped."""
    if not resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
    say(f"drawing {plan.pictures} pictures")
    samples = data.pool(data.TRAIN, plan.pictures)
    demo = store.load(weights)
    factor = demo.vae.config.scaling_factor
    moments = cached(checkpoints / "latents.pt", lambda: losses.encode(demo.vae, samples) * factor)
    rows = cached(checkpoints / "low.pt", lambda: low.condition(demo.vae, low.shrink(samples.images)))

    dit = started(demo.dit, plan.blocks).requires_grad_(True)
    loss = losses.diffusion_loss(moments, plan.stage.batch, low=(rows, 0.0))
    fitted = fit(dit, loss, plan.stage, seed, checkpoints)
    store.save_transformer(fitted.module, output)
    store.save_scheduler(output)
    figures = {"seed": seed, "pictures": plan.pictures, "dit": stage_figures(fitted, plan.stage)}
    write_file(output / "training.json", json.dumps(figures, indent=2) + "\n")
    say(json.dumps(figures))


def started(dit: DiT, blocks: tuple[int, ...]) -> DiT:
    """Return some blocks of a class-conditional DiT as one that takes a low-resolution picture, and no labels.

    It starts as the null label's network: the weights of the picture's channels are zero.
    """
    spec = dit.spec
    new = DiT(replace(spec, depth=len(blocks), num_classes=0, low_channels=spec.channels))
    state = {name: tensor for name, tensor in dit.state_dict().items() if not name.startswith("blocks.")}
    for place, block in enumerate(blocks):
        state |= {f"blocks.{place}.{name}": tensor for name, tensor in dit.blocks[block].state_dict().items()}
    state["patches.weight"] = F.pad(state["patches.weight"], (0, 0, 0, 0, 0, spec.channels))
    state["embedders.0.label.weight"] = state["embedders.0.label.weight"][spec.null_label :]
    new.load_state_dict(state)
    return new
