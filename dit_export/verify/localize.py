"""Where a failing engine first leaves the right way: which vectors of the conditioner, which block of the denoiser."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dit_export.networks.dit import DiT
from dit_export.networks.spec import CONDITIONINGS, ModelSpec
from dit_export.verify.reference import guide, hoisted
from dit_export.verify.taps import names, pytorch_stream, tapped
from dit_runtime import replay
from dit_runtime.backends import QUANTIZED, Engine, Options
from dit_runtime.pipeline import Pipeline
from dit_runtime.replay import Reference, relative_error
from dit_runtime.verify import tolerances

OF_BRANCH = ("gain", "shift", "gate")
TOKENS = ("of the timestep", "of the label")
FINAL = ("final gain", "final shift")
MANY = 4  # more names than this are counted
SPREAD = 16  # labels that are asked besides the reference's


class Question(NamedTuple):
    """One guided evaluation of the reference run."""

    latents: NDArray[np.float32]  # (B, C, H, W)
    t: float
    labels: list[int]  # (B,)
    guidance: NDArray[np.float32]  # (B,)


class Truth(Protocol):
    name: str

    def vectors(self, t: float, labels: Sequence[int]) -> NDArray[Any]:
        """(N, K + M, D)."""

    def stream(self, question: Question, rows: NDArray[Any]) -> tuple[list[NDArray[Any]], NDArray[Any]]:
        """The residual stream, and the guided prediction."""


class OfPyTorch:
    name = "PyTorch"

    def __init__(self, model: DiT) -> None:
        self._model = model

    def vectors(self, t: float, labels: Sequence[int]) -> NDArray[Any]:
        return hoisted(self._model)(np.full(len(labels), t, np.float32), np.array(labels, np.int64))

    def stream(self, question: Question, rows: NDArray[Any]) -> tuple[list[NDArray[Any]], NDArray[Any]]:
        stream, out = pytorch_stream(self._model, question.latents, question.t, question.labels)
        spec = self._model.spec
        first, null = np.split(out[:, : spec.channels], 2)
        return stream, guide(first, null, question.guidance, spec.guided_channels)


class OfBundle:
    def __init__(self, pipe: Pipeline, engine: Engine, taps: list[str]) -> None:
        self.name, self._pipe, self._engine, self._taps = str(pipe.folder), pipe, engine, taps

    def vectors(self, t: float, labels: Sequence[int]) -> NDArray[Any]:
        return replay.hoisted(self._pipe)(np.full(len(labels), t, np.float32), np.array(labels, np.int64))

    def stream(self, question: Question, rows: NDArray[Any]) -> tuple[list[NDArray[Any]], NDArray[Any]]:
        context = self._pipe.examples(question.labels, guided=True)(slice(None))
        vectors = rows.shape[2] - (context["context"].shape[2] if context else 0)
        inputs = {"latents": question.latents, "conditioning": rows[:, :, :vectors], "guidance": question.guidance}
        if context:
            inputs |= context | {"context": rows[:, :, vectors:]}
        out = self._engine.run(inputs)
        return [out[name] for name in self._taps], out["prediction"]


class Tap(NamedTuple):
    name: str
    error: float  # relative L2


class Located(NamedTuple):
    sentences: list[str]
    taps: list[Tap]


def locate(
    pipe: Pipeline, reference: Reference, truth: Truth | Pipeline, step: int, wrong: Sequence[int], options: Options
) -> Located:
    """At one step of the reference run (from 0); `wrong` are labels whose conditioning is known to be off."""
    question = Question(
        reference.latents[step],
        float(reference.timesteps[step]),
        [int(label) for label in reference.labels],
        reference.guidance,
    )
    limits = tolerances(pipe.manifest)
    precisions = {pipe.manifest.graphs["denoiser"].precision}
    with ExitStack() as stack:
        if isinstance(truth, Pipeline):
            precisions.add(truth.manifest.graphs["denoiser"].precision)
            truth = OfBundle(truth, *stack.enter_context(tapped(truth, options)))
        engine, taps = stack.enter_context(tapped(pipe, options))
        ours = OfBundle(pipe, engine, taps)
        contract, smoothed = pipe.manifest, not precisions.isdisjoint(QUANTIZED)
        everyone = [*question.labels, *[contract.null_label] * len(question.labels)]
        spread = np.linspace(0, contract.num_classes - 1, min(contract.num_classes, SPREAD)).astype(int).tolist()
        asked = list(dict.fromkeys([*wrong[: SPREAD // 2], *everyone, *spread]))
        each = vector_names(contract.model)
        right = truth.vectors(question.t, asked)
        given = ours.vectors(question.t, asked)
        if right.shape != given.shape:
            why = f"the conditioner gives {list(given.shape[1:])}, that of {truth.name} {list(right.shape[1:])}"
            return Located([f"not localized: {why}"], [])
        if smoothed:
            right = right * _folded(given, right, each)
        wrong_vectors = ~(_errors(given, right) <= limits["conditioner"].conditioner)  # (labels, K)
        sentences = _vectors(given, right, wrong_vectors, asked, contract.null_label, each)
        if smoothed and (wrong_vectors.mean(0) > 0.5).any():
            why = "what smoothing has folded into the conditioner cannot be told from what is wrong with it"
            return Located([*sentences, f"denoiser: not localized: {why}"], [])

        order = [asked.index(label) for label in everyone]
        shape = (2, len(question.labels), *right.shape[1:])
        got, prediction = ours.stream(question, right[order].reshape(shape))
        expected, answer = truth.stream(question, truth.vectors(question.t, everyone).reshape(shape))
    error = relative_error(prediction, answer)
    limit = limits["denoiser"]
    # What no conditioning has touched yet is there once, for both halves of guidance.
    expected = [every[: len(rows)] for rows, every in zip(got, expected, strict=False)] + expected[len(got) :]
    if len(got) != len(expected) or any(a.shape != b.shape for a, b in zip(got, expected, strict=True)):
        sentences.append(f"not localized: the denoiser has {len(got)} taps, that of {truth.name} {len(expected)}")
        return Located(sentences, [])
    places = names(len(got) - 1, int(contract.model.get("depth", 0)))
    found = [Tap(name, relative_error(*pair)) for name, *pair in zip(places, got, expected, strict=True)]
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


def vector_names(model: Mapping[str, Any]) -> list[str]:
    """Of the K + M vectors that leave the loop, by what a manifest says about its network."""
    depth, tokens = int(model.get("depth", 0)), int(model.get("caption_tokens", 0))
    by = CONDITIONINGS[model.get("conditioning", ModelSpec.conditioning)]

    def of_blocks(vectors: Sequence[str]) -> list[str]:
        return [f"block {n + 1} of {depth} (blocks.{n}), {vector}" for n in range(depth) for vector in vectors]

    modulated = OF_BRANCH[: by.modulation // 2]
    read = [f"cross-attention {part} {token}" for part in ("key", "value") for token in TOKENS]
    block = [f"attention {vector}" for vector in modulated]
    block += read if by.crossed and not by.captioned else []
    block += [f"MLP {vector}" for vector in modulated]
    caption = [f"cross-attention {part} of the caption" for part in ("key", "value") for _ in range(tokens)]
    each = [f"token {token}" for token in TOKENS] if by.appended else []
    return each + of_blocks(block) + list(FINAL if modulated else ()) + of_blocks(caption if by.captioned else ())


def _folded(given: NDArray[Any], right: NDArray[Any], each: Sequence[str]) -> NDArray[Any]:
    """(K + M, D): by what smoothing has multiplied each channel: a branch's gain and shift alike, or the values of one
    cross-attention, the same for every label.

    The median over the labels, so that some wrong ones do not move it; 1 where those that go together disagree.
    """
    together: dict[str, list[int]] = {}
    for k, name in enumerate(each):
        if name not in FINAL:
            together.setdefault(re.sub(" (gain|shift)$| of the (timestep|label|caption)$", "", name), []).append(k)
    folded = np.ones(given.shape[1:])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nan_to_num(np.median(given / right, axis=0), nan=1.0, posinf=1.0, neginf=1.0)
    for rows in together.values():
        first = ratio[rows[0]]
        apart = max((np.median(np.abs(first - ratio[k])) for k in rows[1:]), default=np.inf)
        if apart < 1e-3 * np.median(np.abs(first)):
            folded[rows] = np.where(first > 0, first, 1)
    return folded


def _errors(given: NDArray[Any], right: NDArray[Any]) -> NDArray[np.float64]:
    """(labels, K)."""
    pairs = zip(given, right, strict=True)
    return np.array([[relative_error(*pair) for pair in zip(*rows, strict=True)] for rows in pairs])


def _vectors(
    given: NDArray[Any],
    right: NDArray[Any],
    wrong: NDArray[np.bool_],
    labels: list[int],
    null_label: int,
    each: list[str],
) -> list[str]:
    """Which vectors are off, of which labels."""
    if not wrong.any():
        return []
    count = wrong.shape[1]
    if count != len(each):
        each = [f"vector {k + 1} of {count}" for k in range(count)]
    columns, rows = np.flatnonzero(wrong.any(0)), np.flatnonzero(wrong.any(1))
    if len(columns) == count:
        what = "every vector"
    elif len(columns) > MANY:
        what = f"{len(columns)} of {count} vectors, first {each[columns[0]]}"
    else:
        what = "; ".join(dict.fromkeys(each[k] for k in columns))
    who = "every label asked" if len(rows) == len(labels) else ", ".join(f"label {labels[n]}" for n in rows[:MANY])
    if [labels[n] for n in rows] == [null_label]:
        who = f"the null label ({null_label})"
    return [f"conditioner: {what}, for {who}: rel-L2 {np.nanmax(_errors(given, right)):.3g}"]
