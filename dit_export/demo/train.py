"""`dit-export demo train`: data set, autoencoder, judge, latents and DiT, each resumed where it stopped."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from dit_export.checkpoints.vae import read_vae
from dit_export.demo import data, losses, store
from dit_export.demo.loop import Fitted, Stage, fit, save
from dit_export.demo.vit import ViT, ViTSpec
from dit_export.networks.dit import DiT
from dit_export.networks.spec import ModelSpec
from dit_runtime.files import write_file


@dataclass(frozen=True)
class Plan:
    pictures: int
    held_out: int
    channels: tuple[int, ...]  # of the autoencoder, from the picture's side down
    spec: ModelSpec
    vit: ViTSpec
    autoencoder: Stage
    refined: Stage  # the autoencoder once more
    judge: Stage
    dit: Stage


PLAN = Plan(
    pictures=40_000,
    held_out=2_000,
    channels=(16, 32, 64, 64),
    spec=store.demo_spec(depth=7, hidden=160, heads=5, patch=2),
    vit=ViTSpec(len(data.CLASSES)),
    autoencoder=Stage("autoencoder", steps=3_500, batch=8, rate=2e-3),
    refined=Stage("refined", steps=3_500, batch=8, rate=1.5e-3),
    judge=Stage("judge", steps=1_200, batch=64, rate=2e-3, decay=0.05),
    dit=Stage("dit", steps=14_000, batch=64, rate=2e-3, warmup=300, muon=True),
)


def train(
    output: Path, seed: int = 0, resume: bool = True, plan: Plan = PLAN, checkpoints: Path = Path("build/demo")
) -> None:
    """Train the demo model into a diffusers-style folder; run it again after an interruption and it goes on."""
    if not resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
    say(f"drawing {plan.pictures} pictures")
    samples = data.pool(data.TRAIN, plan.pictures)
    unseen = data.pool(data.HELD_OUT, plan.held_out)

    torch.manual_seed(seed)
    vae = autoencoder(plan.channels)
    first = fit(vae, losses.autoencoder_loss(samples, plan.autoencoder.batch), plan.autoencoder, seed, checkpoints)
    vae = first.module.requires_grad_(True)  # from its averaged weights, with the rate up again: a warm restart
    again = fit(vae, losses.autoencoder_loss(samples, plan.refined.batch), plan.refined, seed + 1, checkpoints)
    store.save_vae(scaled(again.module, samples), output)
    vae, _ = read_vae(output, plan.spec.channels)  # what ships, rounded to float16, is what makes the latents

    torch.manual_seed(seed)
    judge = fit(ViT(plan.vit), losses.judge_loss(samples, plan.judge.batch), plan.judge, seed, checkpoints)
    store.save_judge(judge.module, output)

    latents = cached(checkpoints / "latents.pt", lambda: losses.encode(vae, samples) * vae.config.scaling_factor)
    torch.manual_seed(seed)
    dit = zero_initialised(DiT(plan.spec))
    labels = torch.from_numpy(samples.labels)
    loss = losses.diffusion_loss(latents, plan.dit.batch, labels=(labels, plan.spec.null_label))
    fitted = fit(dit, loss, plan.dit, seed, checkpoints)
    store.save_transformer(fitted.module, output)
    store.save_index(output)

    demo = store.load(output)
    figures = {
        "seed": seed,
        "pictures": plan.pictures,
        "held_out": plan.held_out,
        "autoencoder": stage_figures(first, plan.autoencoder),
        "refined": stage_figures(again, plan.refined) | reconstruction_figures(demo, unseen),
        "judge": stage_figures(judge, plan.judge) | {"held_out_accuracy": accuracy(demo.judge, unseen)},
        "dit": stage_figures(fitted, plan.dit),
    }
    write_file(output / "training.json", json.dumps(figures, indent=2) + "\n")
    say(json.dumps(figures))


def autoencoder(channels: tuple[int, ...]) -> AutoencoderKL:
    """Four latent channels at an eighth of the side, as Stable Diffusion's, but small."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=data.SIDE,
    )
    return vae.to(memory_format=torch.channels_last)


def scaled(vae: AutoencoderKL, samples: data.Samples) -> AutoencoderKL:
    """Set the scaling factor that gives the latents unit deviation, and return the VAE."""
    first = data.Samples(samples.images[:4000], samples.labels[:4000])
    mean, std = losses.encode(vae, first).chunk(2, dim=1)
    total = (mean.var() + std.square().mean()).sqrt()
    vae.register_to_config(scaling_factor=round(1 / total.item(), 5))
    return vae


def zero_initialised(dit: DiT) -> DiT:
    """adaLN-Zero: every block starts as the identity and the network's output as zero; the rest as in the paper."""
    for name, parameter in dit.named_parameters():
        if "modulation" in name or name.startswith("final.linear") or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "embedders" in name:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.xavier_uniform_(parameter.view(len(parameter), -1))
    return dit


def cached(path: Path, make: Callable[[], Tensor]) -> Tensor:
    if not path.exists():
        say("encoding the pictures")
        save({"tensor": make()}, path)
    return torch.load(path, weights_only=True)["tensor"]


def stage_figures(fitted: Fitted[Any], stage: Stage) -> dict[str, Any]:
    return {
        "parameters": store.parameters(fitted.module),
        "steps": stage.steps,
        "batch": stage.batch,
        "rate": stage.rate,
        "ema": stage.ema,
        "seconds": round(fitted.seconds),
        "loss": round(fitted.loss, 5),
    }


@torch.no_grad()
def accuracy(judge: ViT, samples: data.Samples) -> float:
    everything = torch.arange(len(samples.labels))
    hits = [
        judge(losses.pictures(samples, chunk) / 2 + 0.5).logits.argmax(1).numpy() == samples.labels[chunk.numpy()]
        for chunk in everything.split(250)
    ]
    return sum(int(hit.sum()) for hit in hits) / len(everything)


@torch.no_grad()
def reconstruction_figures(demo: store.Demo, samples: data.Samples) -> dict[str, float]:
    """PSNR of held-out pictures through the autoencoder, and how many the judge still names rightly."""
    errors, hits = [], 0
    everything = torch.arange(len(samples.labels))
    for chunk in everything.split(250):
        images = losses.pictures(samples, chunk)
        decoded = demo.vae.decode(demo.vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((decoded - images).square().mean().item() / 4)
        named = demo.judge(decoded / 2 + 0.5).logits.argmax(1).numpy()
        hits += int((named == samples.labels[chunk.numpy()]).sum())
    psnr = -10 * torch.tensor(errors).mean().log10().item()
    return {
        "scaling_factor": demo.vae.config.scaling_factor,
        "held_out_psnr": round(psnr, 2),
        "judge_on_reconstructions": hits / len(everything),
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
