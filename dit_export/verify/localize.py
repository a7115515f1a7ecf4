"""Where a failing bundle first leaves the right way: which tensors of a stage, which residual sum of the denoiser.

Stages before the loop are compared tensor by tensor. The denoiser is compared after each residual sum, reading the
right tensors, so that a broken stage does not accuse it.
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
from dit_export.verify.reference import Crossing, Divisors, evaluate, guide, load_divisors
from dit_export.verify.taps import tapped
from dit_export.verify.traced import Traced
from dit_runtime.backends import Engine, Options
from dit_runtime.bundle.records import GUIDANCE
from dit_runtime.conditions.condition import Condition
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.verify import Reference, relative_error, tolerances

MANY = 4  # more names than this are counted
Arrays = Mapping[str, NDArray[Any]]


class Question(NamedTuple):
    """One guided evaluation of the reference run."""

    state: NDArray[np.float32]  # (B, C, ...)
    t: float
    condition: Condition  # B rows
    null: Condition  # B rows
    guidance: NDArray[np.float32]  # (B,)

    @property
    def groups(self) -> list[Condition]:
        """The condition and, where there is one, what guidance leads away from."""
        return [self.condition, self.null] if self.null else [self.condition]


class Answer(NamedTuple):
    stream: Arrays  # by the names of traced tensors, (B or G · B, ...)
    prediction: NDArray[Any]  # (B, C, ...), guided


class Side(Protocol):
    """One of the two that are compared; its tensors have smoothing's divisors multiplied back."""

    name: str

    def crossing(self, t: float, condition: Condition, rows: int) -> Arrays:
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
    return PyTorch(loaded.network, Oracle(program.exported_program))


class PyTorchSide:
    name = "PyTorch"

    def __init__(self, network: Network, oracle: Oracle, packs: Sequence[Pack], taps: Sequence[str]) -> None:
        self._network, self._oracle = network, oracle
        self._taps = [tap for tap in taps if tap in oracle]
        self._crossing = Crossing(network, oracle, packs, {})

    def crossing(self, t: float, condition: Condition, rows: int) -> Arrays:
        return self._crossing(t, condition, rows)

    def denoise(self, question: Question, crossing: Sequence[Arrays]) -> Answer:
        """Evaluate the traced program; it makes what crosses by itself."""
        network, count = self._network, len(question.groups)
        inputs = {
            network.state.name: np.concatenate([question.state] * count),
            network.time.name: np.full(count * len(question.state), question.t, np.float32),
        }
        for name in question.condition:
            inputs[name] = np.concatenate([group[name] for group in question.groups])
        stream = self._oracle(self._taps, **{name: torch.from_numpy(rows) for name, rows in inputs.items()})
        answer = evaluate(network, question.state, inputs[network.time.name], question.condition, question.null)
        prediction = guide(answer.conditional, answer.null, question.guidance, network.guided_channels)
        return Answer({name: rows.numpy() for name, rows in stream.items()}, prediction)


class BundleSide:
    def __init__(self, pipe: Pipeline, engine: Engine, taps: Mapping[str, str], divisors: Divisors) -> None:
        """Take the engine's taps by what to call them."""
        self.name, self._pipe, self._engine = str(pipe.folder), pipe, engine
        self._taps, self._divisors = taps, divisors

    def crossing(self, t: float, condition: Condition, rows: int) -> Arrays:
        engines = self._pipe.engines
        inputs = engines.inputs(np.array([t]), dict(condition), None, np.ones(rows, np.float32))(0, slice(0, rows))
        made = [spec.name for stage in engines.manifest.before_loop for spec in stage.gives if spec.name in inputs]
        return {name: np.asarray(inputs[name])[0] * self._divisors.get(name, np.float32(1)) for name in made}

    def denoise(self, question: Question, crossing: Sequence[Arrays]) -> Answer:
        contract = self._pipe.manifest
        inputs: dict[str, NDArray[Any]] = {contract.state.name: question.state}
        if contract.mixes_guidance:
            inputs[GUIDANCE] = question.guidance
        for spec in contract.step.grouped:
            groups = [
                values[spec.name] / self._divisors.get(spec.name, np.float32(1))
                if spec.name in values
                else own[spec.name]
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
    """Rows that the stages before the loop are asked about, and what to call each."""

    condition: Condition
    names: list[str]


def locate(
    pipe: Pipeline, reference: Reference, truth: PyTorch | Pipeline, step: int, asked: Asked, options: Options
) -> Located:
    """Compare at one step of the reference run (from 0); `asked` is compared before the loop."""
    contract, rows = pipe.manifest, len(reference.guidance)
    traces = traced.read(pipe.folder)
    null = {name: np.repeat(values, rows, axis=0) for name, values in (reference.negative or {}).items()}
    t = float(reference.timesteps[step])
    question = Question(reference.latents[step], t, reference.condition, null, reference.guidance)
    limits = tolerances(contract)
    with ExitStack() as stack:
        engine, taps = stack.enter_context(tapped(pipe, options))
        ours = BundleSide(pipe, engine, dict(zip(taps, taps, strict=True)), load_divisors(pipe.folder, traces.packs))
        right: Side
        if isinstance(truth, Pipeline):
            other, others = stack.enter_context(tapped(truth, options))
            packs = traced.read(truth.folder).packs
            forms = [[(pack.name, pack.sizes) for pack in each] for each in (packs, traces.packs)]
            if forms[0] != forms[1] or len(others) != len(taps):
                return Located([f"not localized: {truth.folder} was split into other stages"], [])
            right = BundleSide(truth, other, dict(zip(taps, others, strict=True)), load_divisors(truth.folder, packs))
        else:
            right = PyTorchSide(*truth, traces.packs, taps)
        stages = {spec.name: stage for stage in contract.before_loop for spec in stage.gives}
        got, expected = (side.crossing(t, asked.condition, len(asked.names)) for side in (ours, right))
        sentences = []
        for pack in traces.packs:
            errors = _errors(got[pack.name], expected[pack.name], pack)
            off = ~(errors <= limits[stages[pack.name].name].conditioner)  # (rows, tensors)
            if off.any():
                what, who = _what(pack, off.any(axis=0), traces), _who(asked, off.any(axis=1))
                largest = np.nanmax(errors)
                sentences.append(f"{stages[pack.name].name}: {what}, for {who}: rel-L2 {largest:.3g}")
        true = [right.crossing(t, row_group, rows) for row_group in question.groups]
        given, truly = ours.denoise(question, true), right.denoise(question, true)
    places = _places(taps, traces)
    limit, name = limits[contract.step.name], contract.step.name
    # What no condition has touched yet is there once, for both groups.
    shared = [(tap, given.stream[tap], truly.stream[tap]) for tap in taps if tap in truly.stream]
    found = [Tap(places[tap], relative_error(mine, theirs[: len(mine)])) for tap, mine, theirs in shared]
    found.append(Tap("after the last residual sum", relative_error(given.prediction, truly.prediction)))
    bounds = [limit.prediction] * (len(found) - 1) + [limit.guided]
    moved = next((n for n, bound in enumerate(bounds) if not found[n].error <= bound), None)
    if moved is not None:
        tap, before = found[moved], found[moved - 1].error if moved else 0.0
        sentences.append(f"{name}: first moved: {tap.name}: rel-L2 {tap.error:.3g}, before it {before:.3g}")
    elif not sentences:
        rises = np.diff([0.0, *(tap.error for tap in found[:-1])], append=0.0)
        worst = found[int(rises.argmax())]
        sentences.append(
            f"{name}: no residual sum is beyond its precision's tolerance beside {right.name}; the largest rise is at "
            f"{worst.name}: rel-L2 {worst.error:.3g}"
        )
    return Located(sentences, found)


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


def _what(pack: Pack, off: NDArray[np.bool_], traces: Traced) -> str:
    names = [
        f"{pack.name} {n + 1} of {len(pack.tensors)} ({traces.places.get(tensor, tensor)})"
        for n, tensor in enumerate(pack.tensors)
    ]
    which = np.flatnonzero(off)
    if len(names) == 1:
        return pack.name
    if len(which) == len(names):
        return f"every tensor of {pack.name}"
    if len(which) > MANY:
        return f"{len(which)} of {len(names)} tensors, first {names[which[0]]}"
    return "; ".join(names[n] for n in which)


def _who(asked: Asked, off: NDArray[np.bool_]) -> str:
    if off.all():
        return "every condition asked"
    return ", ".join(asked.names[n] for n in np.flatnonzero(off)[:MANY])
