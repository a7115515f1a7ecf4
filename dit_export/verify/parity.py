"""A bundle's engines against PyTorch itself, and the proof that this comparison can fail."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from dit_export.networks import Network, fixtures
from dit_export.networks.codec import Decoder
from dit_export.networks.encoding import Encoder
from dit_export.verify.inputs import grouped
from dit_export.verify.reference import encode, evaluate, guide
from dit_runtime.bundle.records import GUIDANCE
from dit_runtime.conditions.condition import Rows
from dit_runtime.errors import EngineError
from dit_runtime.images import psnr
from dit_runtime.pipeline import Pipeline
from dit_runtime.sampling.solvers import EVALUATIONS
from dit_runtime.verify import TOLERANCES, Figure, Reference, latents_psnr, relative_error

PROOF_LIMIT = 10 * TOLERANCES["fp32"].guided  # by which a wrong input must miss
LEAST_SHARE = 0.5  # of what a condition changes in PyTorch, in a lower precision
TIMESTEP_SHIFT = 0.05  # of the schedule
FINITE_RUNS = 16
FINITE_SEED = 2000  # neither the reference's nor calibration's
DECODER_PSNR = {"fp32": 80.0, "bf16": 40.0, "fp16": 55.0, "int8": 40.0}  # of float pictures in [0, 1]


def proof(pipe: Pipeline, reference: Reference) -> list[Figure]:
    """Ask the fp32 parity check about inputs that are not the reference's: each must miss by 10 x.

    adaLN-Zero at initialisation predicts zero, and weak random weights hardly depend on their condition; parity on such
    weights proves nothing. The error is taken to the engine's own answer to the reference's question, for beside
    PyTorch's a low precision's rounding alone would miss by as much.
    """
    contract, step = pipe.manifest, len(reference.timesteps) // 2
    t, guidance = float(reference.timesteps[step]), reference.guidance
    condition, null = reference.condition, reference.negative or {}
    span, place = contract.process.span, f"t = {t:g}"
    moved = t + TIMESTEP_SHIFT * span * (1 if t < span / 2 else -1)
    other = fixtures.another(contract.conditions, condition, null) if condition else {}
    own = _answer(pipe, reference, t, condition, null, guidance)
    questions = {"t moved by 5 %": (moved, condition, guidance)}
    if condition:
        questions = {"another condition": (t, other, guidance)} | questions
    if contract.mixes_guidance:
        questions["guidance x 2"] = (t, condition, 2 * guidance)
    if port := contract.guidance.port:
        questions["guidance x 2"] = (t, condition | {port: 2 * guidance}, guidance)
    figures = []
    for name, (time, asked, weights) in questions.items():
        error = relative_error(_answer(pipe, reference, time, asked, null, weights), own)
        figure = Figure("proof", f"{name}, rel-L2", error, PROOF_LIMIT, at_least=True, step=step + 1, where=place)
        figures.append(figure)
    return figures


def reacts(reference: Reference) -> bool:
    """Return whether a condition changes PyTorch's own prediction by what the proof asks for."""
    step = len(reference.timesteps) // 2
    if not reference.null.size:
        return False
    pair = reference.conditional[step], reference.null[step]
    return relative_error(*pair) >= PROOF_LIMIT


def condition_share(pipe: Pipeline, reference: Reference) -> list[Figure]:
    """Compare what a condition changes with PyTorch's: a lower precision must keep what guidance multiplies.

    With d = conditional − null, the engine's d is projected on PyTorch's: ⟨d, d_PyTorch⟩ / ||d_PyTorch||² is 1 for an
    exact engine and 0 for one that rounds the condition away. Rounding has no direction, so this needs no tolerance of
    the precision.
    """
    stage, step, condition = pipe.manifest.step, len(reference.timesteps) // 2, reference.condition
    if stage.precision == "fp32" or not reference.null.size:
        return []
    t, rows = float(reference.timesteps[step]), len(reference.latents[step])
    null = {name: np.repeat(values, rows, axis=0) for name, values in (reference.negative or {}).items()}
    change, other = (_answer(pipe, reference, t, own, {}, reference.guidance) for own in (condition, null))
    share = _share(change - other, reference.conditional[step] - reference.null[step])
    name, place = f"what a condition changes in {stage.precision}, share of PyTorch's", f"t = {t:g}"
    return [Figure(stage.name, name, share, LEAST_SHARE, at_least=True, step=step + 1, where=place)]


def _answer(
    pipe: Pipeline, reference: Reference, time: float, own: Rows, null: Rows, weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the predictions for the latents in the middle of the reference's run."""
    state, size, parts = reference.latents[len(reference.timesteps) // 2], pipe.manifest.step.max_batch, []
    for first in range(0, len(state), size):
        part = slice(first, first + size)
        some = {name: values[part] for name, values in own.items()}
        times = np.full(len(state[part]), time, np.float32)
        parts.append(_denoise(pipe, state[part], times, some, null, weights[part])["prediction"])
    return np.concatenate(parts)


def _share(change: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    first, second = change.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    return float(first @ second / max(float(second @ second), 1e-30))


def graph_parity(pipe: Pipeline, network: Network, decoder: Decoder | None, seed: int = 0) -> Iterator[Figure]:
    """Compare denoiser and decoder at their smallest, a middle and their largest batch, at timesteps of all levels.

    The denoiser reads what the bundle's own stages make, at the same batches; the last row has the null condition.
    """
    contract, step = pipe.manifest, pipe.manifest.step
    generator = torch.Generator().manual_seed(seed)
    null = fixtures.null(network)
    for batch in _batches(step.max_batch):
        state = torch.randn(batch, *network.state.shape, generator=generator).numpy()
        timesteps = np.linspace(0, contract.process.span, batch + 2)[1:-1].astype(np.float32)
        condition = fixtures.conditions(network, batch)
        if batch > 1:
            condition = {name: np.concatenate([rows[:-1], null[name]]) for name, rows in condition.items()}
        weights = np.linspace(1.0, 4.0, batch, dtype=np.float32)
        expected = evaluate(network, state, timesteps, condition, null)
        mixed = guide(network, expected.conditional, expected.null, weights)
        answer = _denoise(pipe, state, timesteps, condition, null, weights)
        limit, place = TOLERANCES[step.precision].guided, f"batch {batch}"
        for name, right in (("prediction", mixed), ("variance", expected.variance)):
            if name in answer:
                error = relative_error(answer[name], right)
                yield Figure(step.name, f"{name} at a batch, rel-L2", error, limit, where=place)
    if decoder is None or contract.end is None:
        return
    for batch in _batches(contract.end.max_batch):
        latents = torch.randn(batch, *network.state.shape, generator=generator)
        with torch.no_grad():
            pictures = decoder(latents).numpy()
        ratio = psnr(pipe.engines.decode(latents.numpy()), pictures, peak=1.0)
        limit, name = DECODER_PSNR[contract.end.precision], "pictures at a batch, PSNR in dB"
        yield Figure(contract.end.name, name, ratio, limit, at_least=True, where=f"batch {batch}")


def encoder_parity(pipe: Pipeline, encoder: Encoder, seed: int = 0) -> Iterator[Figure]:
    """Compare the encoder with PyTorch's on noise; the replay has the reference's pictures."""
    stage = pipe.manifest.require_start()
    shape = [int(size) for size in stage.reads[0].shape[1:]]
    noise = np.random.default_rng(seed).random((2, *shape), np.float32)
    expected, limit = encode(encoder, noise), TOLERANCES[stage.precision].encoded
    for name, values in pipe.engines.encode_pictures(noise).items():
        ratio = latents_psnr(values, expected[name])
        yield Figure(stage.name, f"{name} of noise, PSNR in dB", ratio, limit, at_least=True)


def finite(pipe: Pipeline, network: Network, reference: Reference) -> Figure:
    """Draw whole runs, guided as strongly as the reference: an overflow of any step stops its run."""
    solver, failure = pipe.manifest.process.sampler.solver, ""
    try:
        pipe.sample(
            condition=fixtures.conditions(network, FINITE_RUNS),
            negative=reference.negative if network.mixes_guidance else None,
            steps=len(reference.timesteps) // EVALUATIONS[solver],
            guidance=float(reference.guidance.max()) if network.mixes_guidance else None,
            seed=list(range(FINITE_SEED, FINITE_SEED + FINITE_RUNS)),
            output="latents",
        )
    except EngineError as error:
        failure = str(error)
    return Figure("run", "runs that are not finite", float(bool(failure)), 0, where=failure)


def _denoise(
    pipe: Pipeline,
    state: NDArray[np.float32],
    timesteps: NDArray[np.float32],
    condition: Rows,
    null: Rows,
    weights: NDArray[np.float32],
) -> dict[str, NDArray[np.float32]]:
    """Evaluate the denoiser once, guided where there is a null row, at a timestep for each row."""
    contract = pipe.manifest
    away = null if contract.mixes_guidance else {}
    inputs = {contract.state.name: state, **grouped(pipe.engines, timesteps, condition, away)}
    if contract.mixes_guidance:
        inputs[GUIDANCE] = weights
    return pipe.engines.run(contract.step, inputs)


def _batches(largest: int) -> list[int]:
    return sorted({1, max(1, largest // 4), largest})
