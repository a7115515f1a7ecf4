"""Localization of a bundle's first error: which tensors of a stage, which residual sum of the denoiser.

Stages before the loop are compared tensor by tensor. The denoiser is compared after each residual sum. It reads the
right tensors, so a broken stage does not count against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dit_export.checkpoints import Loaded
from dit_export.graph.oracle import Oracle
from dit_export.graph.trace import trace_network
from dit_export.networks import Network
from dit_export.passes.stages import Pack
from dit_export.verify import traced
from dit_export.verify.inputs import step_rows
from dit_export.verify.reference import Crossing, Divisors, evaluate, guide, load_divisors
from dit_export.verify.taps import tapped
from dit_export.verify.traced import Traced
from dit_runtime.backends import Engine, Options
from dit_runtime.bundle.records import GUIDANCE
from dit_runtime.conditions.condition import Rows
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.verify import Reference, relative_error, tolerances

MANY = 4  # more names than this are counted
Arrays = Mapping[str, NDArray[Any]]


class Question(NamedTuple):
    """One guided evaluation of the reference run."""

    state: NDArray[np.float32]  # (B, C, ...)
    t: float
    condition: Rows  # B rows
    null: Rows  # B rows
    guidance: NDArray[np.float32]  # (B,)

    @property
    def groups(self) -> list[Rows]:
        """The condition and, where there is one, what guidance leads away from."""
        return [self.condition, self.null] if self.null else [self.condition]


class Answer(NamedTuple):
    stream: Arrays  # by the names of traced tensors, (B or G · B, ...)
    prediction: NDArray[Any]  # (B, C, ...), guided


class Side(Protocol):
    """One of the two that are compared; its tensors have smoothing's divisors multiplied back."""

    name: str

    def crossing(self, t: float, condition: Rows, rows: int) -> Arrays:
        """Return by pack what crosses into the loop, (rows, ...)."""

    def denoise(self, question: Question, crossing: Sequence[Arrays]) -> Answer:
        """Evaluate the denoiser, which reads these tensors, one mapping for each group."""


class PyTorch(NamedTuple):
    """A network with the weights that the bundle was built from, and its traced program."""

    network: Network
    oracle: Oracle


def trace(loaded: Loaded, progress: Progress) -> PyTorch:
    with progress.stage("trace: network"):
        program = trace_network(loaded.network)
    assert program.exported_program is not None
    return PyTorch(loaded.network, Oracle(program.exported_program, loaded.network.weights))


class PyTorchSide:
    name = "PyTorch"

    def __init__(self, network: Network, oracle: Oracle, packs: Sequence[Pack], taps: Sequence[str]) -> None:
        self._network, self._oracle = network, oracle
        self._taps = [tap for tap in taps if tap in oracle.names]
        self._crossing = Crossing(network, oracle, packs, {})

    def crossing(self, t: float, condition: Rows, rows: int) -> Arrays:
        return self._crossing(t, condition, rows)

    def denoise(self, question: Question, crossing: Sequence[Arrays]) -> Answer:
        """Evaluate the traced program; it makes what crosses by itself."""
        network, times = self._network, np.full(len(question.state), question.t, np.float32)
        groups = [{network.state.name: question.state, network.time.name: times, **group} for group in question.groups]
        inputs = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
        stream = self._oracle(self._taps, **{name: torch.from_numpy(rows) for name, rows in inputs.items()})
        answer = evaluate(network, question.state, times, question.condition, question.null)
        prediction = guide(network, answer.conditional, answer.null, question.guidance)
        return Answer({name: rows.numpy() for name, rows in stream.items()}, prediction)


class BundleSide:
    def __init__(self, pipe: Pipeline, engine: Engine, taps: Mapping[str, str], divisors: Divisors) -> None:
        """Take the engine's taps by what to call them."""
        self.name, self._pipe, self._engine = str(pipe.folder), pipe, engine
        self._taps, self._divisors = taps, divisors

    def crossing(self, t: float, condition: Rows, rows: int) -> Arrays:
        engines = self._pipe.engines
        values = step_rows(engines, np.full(rows, t, np.float32), condition)
        made = [spec.name for stage in engines.manifest.before_loop for spec in stage.gives if spec.name in values]
        return {name: values[name] * self._divisors.get(name, np.float32(1)) for name in made}

    def denoise(self, question: Question, crossing: Sequence[Arrays]) -> Answer:
        contract = self._pipe.manifest
        inputs: dict[str, NDArray[Any]] = {contract.state.name: question.state}
        if contract.mixes_guidance:
            inputs[GUIDANCE] = question.guidance
        times = {contract.time.name: np.full(len(question.state), question.t, np.float32)}
        for spec in contract.step.grouped:
            groups = [
                values[spec.name] / self._divisors.get(spec.name, np.float32(1))
                if spec.name in values
                else (own | times)[spec.name]
                for own, values in zip(question.groups, crossing, strict=True)
            ]
            inputs[spec.name] = np.stack(groups).astype(spec.dtype)
        out = self._engine.run(inputs)
        return Answer({name: out[tap] for name, tap in self._taps.items()}, out["prediction"])


class Tap(NamedTuple):
    name: str
    error: float  # relative L2


class Located(NamedTuple):
    sentences: list[str]
    taps: list[Tap]


class Asked(NamedTuple):
    """Rows to compare in the stages before the loop, and a name for each row."""

    condition: Rows
    names: list[str]


def locate(
    pipe: Pipeline, reference: Reference, truth: PyTorch | Pipeline, step: int, asked: Asked, options: Options
) -> Located:
    """Compare at one step of the reference run (from 0); `asked` is compared before the loop."""
    rows, traces = len(reference.guidance), traced.read(pipe.folder, pipe.manifest)
    away = (reference.negative or {}) if pipe.manifest.mixes_guidance else {}
    null = {name: np.repeat(values, rows, axis=0) for name, values in away.items()}
    t = float(reference.timesteps[step])
    question = Question(reference.latents[step], t, reference.condition, null, reference.guidance)
    with ExitStack() as stack:
        engine, taps = stack.enter_context(tapped(pipe, options))
        divisors = load_divisors(pipe.folder, pipe.manifest, traces.packs)
        ours = BundleSide(pipe, engine, dict(zip(taps, taps, strict=True)), divisors)
        right: Side
        if isinstance(truth, Pipeline):
            other, others = stack.enter_context(tapped(truth, options))
            packs = traced.read(truth.folder, truth.manifest).packs
            forms = [[(pack.name, pack.sizes) for pack in each] for each in (packs, traces.packs)]
            if forms[0] != forms[1] or len(others) != len(taps):
                return Located([f"not localized: {truth.folder} was split into other stages"], [])
            right = BundleSide(
                truth, other, dict(zip(taps, others, strict=True)), load_divisors(truth.folder, truth.manifest, packs)
            )
        else:
            right = PyTorchSide(*truth, traces.packs, taps)
        sentences = _before_loop(pipe, ours, right, traces, t, asked)
        true = [right.crossing(t, group, rows) for group in question.groups]
        answers = ours.denoise(question, true), right.denoise(question, true)
    compared = _compare(*answers, _places(taps, traces))
    limits = tolerances(pipe.manifest)[pipe.manifest.step.name]
    bounds = [limits.prediction] * (len(compared) - 1) + [limits.guided]
    sentence = _first_moved(compared, bounds)
    if sentence or not sentences:
        sentences.append(f"{pipe.manifest.step.name}: {sentence or _largest_rise(compared, right.name)}")
    return Located(sentences, compared)


def _before_loop(pipe: Pipeline, ours: Side, right: Side, traces: Traced, t: float, asked: Asked) -> list[str]:
    """Say by stage which tensors are off, and for which conditions."""
    limits = tolerances(pipe.manifest)
    stages = {spec.name: stage.name for stage in pipe.manifest.before_loop for spec in stage.gives}
    got, expected = (side.crossing(t, asked.condition, len(asked.names)) for side in (ours, right))
    sentences = []
    for pack in traces.packs:
        stage, errors = stages[pack.name], _errors(got[pack.name], expected[pack.name], pack)
        off: NDArray[np.bool_] = ~(errors <= limits[stage].conditioner)  # (rows, tensors)
        if off.any():
            what = _what(pack, np.flatnonzero(off.any(axis=0)), traces)
            who = _who(asked, np.flatnonzero(off.any(axis=1)))
            sentences.append(f"{stage}: {what}, for {who}: rel-L2 {np.nanmax(errors):.3g}")
    return sentences


def _compare(ours: Answer, right: Answer, places: Mapping[str, str]) -> list[Tap]:
    """Return the error at each tap that both have, and of the prediction."""
    taps = []
    for name, place in places.items():
        if name in right.stream:
            values = ours.stream[name]
            # What no condition has touched yet is there once, for both groups.
            taps.append(Tap(place, relative_error(values, right.stream[name][: len(values)])))
    return [*taps, Tap("after the last residual sum", relative_error(ours.prediction, right.prediction))]


def _first_moved(taps: Sequence[Tap], bounds: Sequence[float]) -> str:
    moved = next((n for n, bound in enumerate(bounds) if not taps[n].error <= bound), None)
    if moved is None:
        return ""
    before = taps[moved - 1].error if moved else 0.0
    return f"first moved: {taps[moved].name}: rel-L2 {taps[moved].error:.3g}, before it {before:.3g}"


def _largest_rise(taps: Sequence[Tap], truth: str) -> str:
    rises = np.diff([0.0, *(tap.error for tap in taps[:-1])], append=0.0)
    worst = taps[int(rises.argmax())]
    return (
        f"no residual sum is beyond its precision's tolerance beside {truth}; the largest rise is at {worst.name}: "
        f"rel-L2 {worst.error:.3g}"
    )


def _places(stream: Sequence[str], traces: Traced) -> dict[str, str]:
    """Call each tap by the module behind its sum, or by its traced tensor."""
    count, places = len(stream) - 1, {}
    for n, name in enumerate(stream):
        place = traces.places.get(name)
        number = f"residual sum {n} of {count}"
        places[name] = f"{place} ({number})" if place else f"{number} ({name})"
    return places | dict.fromkeys(stream[:1], "before the first residual sum")


def _errors(got: NDArray[Any], expected: NDArray[Any], pack: Pack) -> NDArray[np.float64]:
    """(rows, tensors)."""
    pairs = [(got, expected)]
    if len(pack.tensors) > 1:
        cuts = np.cumsum(pack.sizes)[:-1]
        pairs = list(zip(np.split(got, cuts, axis=1), np.split(expected, cuts, axis=1), strict=True))
    each = [[relative_error(*rows) for rows in zip(*pair, strict=True)] for pair in pairs]
    return np.array(each).T


def _what(pack: Pack, which: NDArray[np.intp], traces: Traced) -> str:
    names = [
        f"{pack.name} {n + 1} of {len(pack.tensors)} ({traces.places.get(tensor, tensor)})"
        for n, tensor in enumerate(pack.tensors)
    ]
    if len(names) == 1:
        return pack.name
    if len(which) == len(names):
        return f"every tensor of {pack.name}"
    if len(which) > MANY:
        return f"{len(which)} of {len(names)} tensors, first {names[which[0]]}"
    return "; ".join(names[n] for n in which)


def _who(asked: Asked, which: NDArray[np.intp]) -> str:
    if len(which) == len(asked.names):
        return "every condition asked"
    return ", ".join(asked.names[n] for n in which[:MANY])
