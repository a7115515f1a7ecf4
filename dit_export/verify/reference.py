"""PyTorch's own answer: one sampling run in fp32, kept in the bundle as reference.npz (8 MB, or four steps)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_export.graph.trace import Decoder
from dit_export.networks.dit import DiT
from dit_export.networks.spec import ModelSpec
from dit_runtime import images
from dit_runtime.errors import UsageError
from dit_runtime.replay import REFERENCE, Reference, fingerprint
from dit_runtime.sampling.schedule import Diffusion
from dit_runtime.sampling.solvers import EVALUATIONS, plan, solve

SEEDS = (0, 1)
GUIDANCE = (4.0, 1.5)  # what pictures are made with, and what FID is measured with
MAX_STEPS = 10
MAX_BYTES = 7_500_000  # of steps and pictures; the fingerprint and the schedule come to that
LEAST_STEPS = 4  # fewer are no run: larger pictures take more bytes, of 1024 px 17 MB


def make_reference(
    model: DiT,
    decoder: Decoder | None,
    diffusion: Diffusion,
    on_step: Callable[[int, int], None],
    divisors: np.ndarray | float = 1.0,
) -> Reference:
    """The run of the bundle's default solver, with PyTorch as network and as source of noise.

    `divisors` are those that smoothing folded into what leaves the loop, (K + M, D).
    """
    spec = model.spec
    solver = diffusion.sampler.solver
    steps = step_count(spec, diffusion)
    timesteps = plan(diffusion, solver, steps)
    evaluations = len(timesteps)
    labels = torch.tensor([spec.num_classes // 4, (3 * spec.num_classes) // 4])
    weights = np.array(GUIDANCE, np.float32)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    sample_shape = (1, *spec.latent_shape)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return torch.cat([torch.randn(sample_shape, generator=generator) for generator in generators]).numpy()

    noise = draw((len(SEEDS), *sample_shape[1:]))
    run = solve(diffusion, solver, steps, noise, draw)
    seen, guided, conditional, null, variances = [], [], [], [], []
    state, t = next(run)
    for step in range(evaluations):
        x = state.astype(np.float32)
        out = evaluate(model, torch.from_numpy(x), torch.full((2,), float(t)), labels)
        mixed = guide(out.conditional, out.null, weights, spec.guided_channels)
        seen.append(x)
        guided.append(mixed)
        conditional.append(out.conditional)
        null.append(out.null)
        variances.append(out.variance)
        on_step(step + 1, evaluations)
        try:
            state, t = run.send((mixed, out.variance if spec.learned_variance else None))
        except StopIteration as end:
            state = end.value
    seen.append(state.astype(np.float32))

    pictures = np.empty(0, np.uint8)
    if decoder is not None:
        with torch.no_grad():
            decoded = [decoder(torch.from_numpy(latents[None])) for latents in seen[-1]]
        pictures = images.to_uint8(torch.cat(decoded).numpy())
    return Reference(
        betas=diffusion.betas,
        timesteps=timesteps,
        labels=labels.numpy(),
        seeds=np.array(SEEDS, np.int64),
        guidance=weights,
        latents=np.stack(seen),
        prediction=np.stack(guided),
        conditional=np.stack(conditional),
        null=np.stack(null),
        variance=np.stack(variances),
        fingerprint=fingerprint(hoisted(model, divisors), spec.num_classes, timesteps[evaluations // 2], max_rows=16),
        images=pictures,
    )


def step_count(spec: ModelSpec, diffusion: Diffusion) -> int:
    """As many as fit the size and the solver's spacing."""
    bytes_a_step = len(SEEDS) * math.prod(spec.latent_shape) * 4 * 5
    pictures = len(SEEDS) * 3 * 64 * math.prod(spec.latent_shape[1:])
    solver = diffusion.sampler.solver
    fit = (MAX_BYTES - pictures) // bytes_a_step - 1
    most = min(MAX_STEPS, max(LEAST_STEPS, fit)) // EVALUATIONS[solver]
    for steps in range(most, 0, -1):
        try:
            plan(diffusion, solver, steps)
        except UsageError:
            continue
        return steps
    raise UsageError(f"{solver} has no run of up to {MAX_STEPS} steps with this schedule")


class Evaluation:
    """The network's rows with the label and with the null label, split into channels."""

    def __init__(self, rows: Tensor, channels: int) -> None:
        first, last = rows.chunk(2)
        self.conditional = first[:, :channels].numpy()
        self.null = last[:, :channels].numpy()
        self.variance = first[:, channels:].numpy()


def evaluate(model: DiT, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Evaluation:
    """PyTorch with B rows that have their labels and B that have the null label."""
    null = torch.full_like(labels, model.spec.null_label)
    with torch.no_grad():
        rows = model(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), **model.told(torch.cat([labels, null])))
    return Evaluation(rows, model.spec.channels)


def guide(conditional: np.ndarray, null: np.ndarray, weights: np.ndarray, guided_channels: int) -> np.ndarray:
    """null + w (conditional − null) on the guided channels, the rest conditional."""
    result = conditional.copy()
    part = slice(0, guided_channels)
    result[:, part] = null[:, part] + weights[:, None, None, None] * (conditional[:, part] - null[:, part])
    return result


def hoisted(model: DiT, divisors: np.ndarray | float = 1.0) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """What the bundle computes outside the loop, [N, K, D], or [N, K + M, D] with captions, by PyTorch."""

    @torch.no_grad()
    def vectors(timesteps: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        told = model.told(torch.from_numpy(numbers))
        rows = model.vectors(torch.from_numpy(timesteps), told.get("labels"))
        if "captions" in told:
            rows = torch.cat([rows, model.context(**told)[0]], dim=1)
        return rows.numpy() / divisors

    return vectors


def save_reference(folder: Path, reference: Reference) -> None:
    np.savez(folder / REFERENCE, **reference._asdict())
