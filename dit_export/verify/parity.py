"""A bundle's engines against PyTorch itself, and the proof that this comparison can fail."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from dit_export.graph.trace import Decoder
from dit_export.networks.dit import DiT
from dit_export.verify.reference import evaluate, guide
from dit_runtime.errors import EngineError
from dit_runtime.images import psnr
from dit_runtime.pipeline import Pipeline
from dit_runtime.replay import Reference, relative_error
from dit_runtime.verify import TOLERANCES, Check

PROOF_FACTOR = 10  # a wrong input must miss fp32's tolerance by this much
NARROW_PROOF_FACTOR = 3  # and another label a wider tolerance
TIMESTEP_SHIFT = 0.05  # of the schedule
FINITE_LABELS = 16  # spread over the classes
FINITE_SEED = 2000  # neither the reference's nor calibration's
DECODER_PSNR = {"fp32": 80.0, "bf16": 40.0, "fp16": 55.0}  # of float pictures in [0, 1]: measured 110, 50 and 71 dB


def proof(pipe: Pipeline, reference: Reference) -> list[Check]:
    """The fp32 parity check, asked about inputs that are not the reference's: each must miss by 10 x.

    adaLN-Zero at initialisation predicts zero, and weak random weights hardly hear their label; parity on such
    weights would say nothing. What is missed is the engine's own answer to the reference's question, for beside
    PyTorch's a narrow precision's rounding alone would miss by as much.
    """
    step = len(reference.timesteps) // 2
    t, guidance = float(reference.timesteps[step]), reference.guidance
    classes = pipe.manifest.num_classes
    labels, everyone = [int(label) for label in reference.labels], slice(0, len(reference.labels))
    span = pipe.manifest.diffusion.span
    moved = t + TIMESTEP_SHIFT * span * (1 if t < span / 2 else -1)
    others = [(label + 1) % classes if classes > 1 else pipe.manifest.null_label for label in labels]
    limit = PROOF_FACTOR * TOLERANCES["fp32"].guided

    def answer(time: float, ids: list[int], weights: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = pipe.table([time], ids, guided=True)(0, everyone)
        context = pipe.examples(ids, guided=True)(everyone)
        return pipe.denoise(reference.latents[step], rows, weights, context)[0]

    own, checks = answer(t, labels, guidance), []
    for name, time, ids, weights in (
        ("proof: another label", t, others, guidance),
        ("proof: guidance x 2", t, labels, 2 * guidance),
        ("proof: t moved by 5 %", moved, labels, guidance),
    ):
        error = relative_error(answer(time, ids, weights), own)
        checks.append(Check(name, error, limit, at_least=True, where=f"t = {t:g}"))
    precision = pipe.manifest.graphs["denoiser"].precision
    if precision != "fp32":
        rows = pipe.table([t], others, guided=False)(0, everyone)
        context = pipe.examples(others, guided=False)(everyone)
        prediction, _ = pipe.denoise(reference.latents[step], rows, guidance, context)
        error, limit = relative_error(prediction, reference.conditional[step]), TOLERANCES[precision].prediction
        name = f"proof: another label in {precision}"
        checks.append(Check(name, error, NARROW_PROOF_FACTOR * limit, at_least=True, where=f"t = {t:g}"))
    return checks


def graph_parity(pipe: Pipeline, model: DiT, decoder: Decoder | None, seed: int = 0) -> Iterator[Check]:
    """Denoiser and decoder at their smallest, a middle and their largest batch; timesteps spread over the schedule.

    The denoiser gets what the bundle's own conditioner makes, at the same batches, the null label included.
    """
    spec, contract = model.spec, pipe.manifest
    generator = torch.Generator().manual_seed(seed)
    for batch in _batches(contract.graphs["denoiser"].max_batch):
        latents = torch.randn(batch, *spec.latent_shape, generator=generator)
        timesteps = torch.linspace(0, contract.diffusion.span, batch + 2)[1:-1]
        labels = torch.randint(0, spec.num_classes, (batch,), generator=generator)
        labels[-1] = spec.null_label if batch > 1 else labels[-1]
        weights = torch.linspace(1.0, 4.0, batch).numpy()
        out = evaluate(model, latents, timesteps, labels)
        null = torch.full_like(labels, spec.null_label)
        rows = [pipe.condition(timesteps.numpy(), ids.numpy()) for ids in (labels, null)]
        context = pipe.examples(labels.tolist(), guided=True)(slice(None))
        prediction, variance = pipe.denoise(latents.numpy(), np.stack(rows), weights, context)
        expected = guide(out.conditional, out.null, weights, spec.guided_channels)
        limit = TOLERANCES[contract.graphs["denoiser"].precision].guided
        where = f"batch {batch}"
        yield Check("denoiser graph, rel-L2", relative_error(prediction, expected), limit, where=where)
        if variance is not None:
            error = relative_error(variance, out.variance)
            yield Check("variance graph, rel-L2", error, limit, where=where)
    if decoder is None:
        return
    for batch in _batches(contract.graphs["decoder"].max_batch):
        latents = torch.randn(batch, *spec.latent_shape, generator=generator)
        with torch.no_grad():
            images = decoder(latents).numpy()
        ratio = psnr(pipe.decode(latents.numpy()), images, peak=1.0)
        limit = DECODER_PSNR[contract.graphs["decoder"].precision]
        yield Check("decoder graph, PSNR in dB", ratio, limit, at_least=True, where=f"batch {batch}")


def finite(pipe: Pipeline, reference: Reference) -> Check:
    """Whole runs of many classes, each with the null label beside it: an overflow of any step stops its run."""
    classes = pipe.manifest.num_classes
    labels = sorted({index * classes // FINITE_LABELS for index in range(FINITE_LABELS)})
    guidance, steps = float(reference.guidance.max()), len(reference.timesteps)
    try:
        pipe.sample(labels, steps=steps, guidance=guidance, seed=FINITE_SEED, output="latents")
    except EngineError as error:
        return Check("runs that are not finite", 1, 0, where=str(error))
    return Check("runs that are not finite", 0, 0)


def _batches(largest: int) -> list[int]:
    return sorted({1, max(1, largest // 4), largest})
