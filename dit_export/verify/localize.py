"""Where a failing engine first leaves the right way: which vectors of the conditioner, which block of the denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dit_export.models.dit import DiT
from dit_export.verify.reference import conditioner, guide
from dit_export.verify.taps import names, pytorch_stream, tapped
from dit_runtime.backends import Engine
from dit_runtime.pipeline import Pipeline
from dit_runtime.replay import Reference, relative_error
from dit_runtime.verify import tolerances

VECTORS = ("attention gain", "attention shift", "attention gate", "MLP gain", "MLP shift", "MLP gate")
FINAL = ("final gain", "final shift")
MANY = 4  # more names than this are counted


class Question(NamedTuple):
    """One guided evaluation of the reference run."""

    latents: NDArray[np.float32]  # (B, C, H, W)
    t: float
    labels: list[int]  # (B,)
    guidance: NDArray[np.float32]  # (B,)


class Truth(Protocol):
    name: str

    def vectors(self, t: float, labels: Sequence[int]) -> NDArray[Any]:
        """(N, K, D)."""

    def stream(self, question: Question, rows: NDArray[Any]) -> tuple[list[NDArray[Any]], NDArray[Any]]:
        """The residual stream, and the guided prediction."""


class OfPyTorch:
    name = "PyTorch"

    def __init__(self, model: DiT) -> None:
        self._model = model

    def vectors(self, t: float, labels: Sequence[int]) -> NDArray[Any]:
        return conditioner(self._model)(np.full(len(labels), t, np.float32), np.array(labels, np.int64))

    def stream(self, question: Question, rows: NDArray[Any]) -> tuple[list[NDArray[Any]], NDArray[Any]]:
        stream, out = pytorch_stream(self._model, question.latents, question.t, question.labels)
        spec = self._model.spec
        first, null = np.split(out[:, : spec.channels], 2)
        return stream, guide(first, null, question.guidance, spec.guided_channels)


class OfBundle:
    def __init__(self, pipe: Pipeline, engine: Engine, taps: list[str]) -> None:
        self.name, self._pipe, self._engine, self._taps = str(pipe.folder), pipe, engine, taps

    def vectors(self, t: float, labels: Sequence[int]) -> NDArray[Any]:
        return self._pipe.table([t], labels, guided=False)(0, slice(0, len(labels)))[0]

    def stream(self, question: Question, rows: NDArray[Any]) -> tuple[list[NDArray[Any]], NDArray[Any]]:
        inputs = {"latents": question.latents, "conditioning": rows, "guidance": question.guidance}
        out = self._engine.run(inputs)
        return [out[name] for name in self._taps], out["prediction"]


class Tap(NamedTuple):
    name: str
    error: float  # relative L2


class Located(NamedTuple):
    sentences: list[str]
    taps: list[Tap]


def locate(
    pipe: Pipeline, reference: Reference, truth: Truth | Pipeline, step: int, wrong: Sequence[int], threads: int | None
) -> Located:
    """At one step of the reference run (from 0); `wrong` are labels whose conditioning is known to be off."""
    question = Question(
        reference.latents[step],
        float(reference.timesteps[step]),
        [int(label) for label in reference.labels],
        reference.guidance,
    )
    limits = tolerances(pipe.manifest)
    with ExitStack() as stack:
        if isinstance(truth, Pipeline):
            truth = OfBundle(truth, *stack.enter_context(tapped(truth, threads)))
        engine, taps = stack.enter_context(tapped(pipe, threads))
        ours = OfBundle(pipe, engine, taps)
        everyone = [*question.labels, *[pipe.manifest.null_label] * len(question.labels)]
        asked = list(dict.fromkeys([*wrong[:8], *everyone]))
        depth = int(pipe.manifest.model.get("depth", 0))
        sentences = _vectors(ours, truth, question.t, asked, limits["conditioner"].conditioner, depth)

        rows = truth.vectors(question.t, everyone)
        rows = rows.reshape(2, len(question.labels), *rows.shape[1:])
        got, prediction = ours.stream(question, rows)
        expected, right = truth.stream(question, rows)
    error = relative_error(prediction, right)
    limit = limits["denoiser"]
    if len(got) != len(expected) or any(a.shape != b.shape for a, b in zip(got, expected, strict=True)):
        sentences.append(f"not localized: the denoiser has {len(got)} taps, that of {truth.name} {len(expected)}")
        return Located(sentences, [])
    found = [Tap(n, relative_error(*pair)) for n, *pair in zip(names(len(got) - 1, depth), got, expected, strict=True)]
    found.append(Tap("after the last block: final layer or guidance", error))
    bounds = [limit.prediction] * (len(found) - 1) + [limit.guided]
    moved = next((tap for tap, bound in zip(found, bounds, strict=True) if not tap.error <= bound), None)
    if moved is not None:
        before = found[found.index(moved) - 1].error if moved is not found[0] else 0.0
        sentences.append(f"denoiser: first moved: {moved.name}: rel-L2 {moved.error:.3g}, before it {before:.3g}")
    elif not sentences:
        rises = np.diff([0.0, *(tap.error for tap in found[:-1])])
        worst = found[int(rises.argmax())]
        sentences.append(
            f"denoiser: no block is beyond its precision's tolerance beside {truth.name}; the largest rise is at "
            f"{worst.name}: rel-L2 {worst.error:.3g}"
        )
    return Located(sentences, found)


def _vectors(ours: Truth, truth: Truth, t: float, labels: list[int], limit: float, depth: int) -> list[str]:
    """Which of the K vectors are off, of which labels."""
    got, expected = ours.vectors(t, labels), truth.vectors(t, labels)
    if got.shape != expected.shape:
        return [f"conditioner: gives {list(got.shape[1:])}, {truth.name} {list(expected.shape[1:])}"]
    errors = np.array(
        [[relative_error(*pair) for pair in zip(*rows, strict=True)] for rows in zip(got, expected, strict=True)]
    )
    wrong = ~(errors <= limit)  # (labels, K)
    if not wrong.any():
        return []
    count = errors.shape[1]
    if count == len(VECTORS) * depth + len(FINAL):
        each = [f"block {n + 1} of {depth} (blocks.{n}), {vector}" for n in range(depth) for vector in VECTORS]
        each += FINAL
    else:
        each = [f"vector {k + 1} of {count}" for k in range(count)]
    columns, rows = np.flatnonzero(wrong.any(0)), np.flatnonzero(wrong.any(1))
    if len(columns) == count:
        what = "every vector"
    elif len(columns) > MANY:
        what = f"{len(columns)} of {count} vectors, first {each[columns[0]]}"
    else:
        what = "; ".join(each[k] for k in columns)
    who = "every label asked" if len(rows) == len(labels) else ", ".join(f"label {labels[n]}" for n in rows[:MANY])
    if len(rows) == 1 and labels[rows[0]] == max(labels):
        who = f"the null label ({max(labels)})"
    return [f"conditioner: {what}, for {who}: rel-L2 {np.nanmax(errors):.3g}"]
