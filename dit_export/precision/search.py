"""Search the layers that stay float: those that int8 does not speed up, and the fewest that a check needs."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_export.graph import onnxfile
from dit_export.networks import Network, fixtures
from dit_export.passes.attention import plain_attention
from dit_export.precision import attention
from dit_export.precision.budget import Budget, SearchOptions
from dit_export.precision.halving import fewest
from dit_export.precision.layers import ATTENTION, everything, find, kind, named, tokens
from dit_export.precision.portable import portable
from dit_export.precision.qdq import quantize
from dit_export.precision.smooth import Smoothed
from dit_export.verify.metrics import sentence
from dit_runtime import backends, images
from dit_runtime.backends import PORTABLE_BACKEND, Options
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.conditions.condition import Rows
from dit_runtime.errors import UsageError
from dit_runtime.pipeline import Pipeline
from dit_runtime.sampling.solvers import plan
from dit_runtime.verify import Figure, jsonable, relative_error, worst

STEPS, SEED, SAMPLES = 10, 2000, 2  # of the runs that are compared; the seed is no calibration's
ASKED = (1, 5, 9)  # of these steps, where each layer is tried alone: in noise, in between, nearly done
ROUNDS = 9  # of each pair that is timed
clock = time.perf_counter
FASTER = 1.02  # less may be one measurement's difference from the next
Latents = NDArray[np.float32]
Decode = Callable[[Latents], NDArray[np.float32]]
Tick = Callable[[int, int], None]
Check = Callable[[Pipeline], Sequence[Figure]]  # holds where every figure keeps its limit


class OutOfReach(UsageError):
    """A check that no choice of layers passes; `figure` is the figure that fails."""

    def __init__(self, message: str, figure: Figure) -> None:
        super().__init__(message)
        self.figure = figure


class LayerSensitivity(NamedTuple):
    """A layer in sensitivity.json."""

    layer: str
    error: float  # of the prediction, teacher-forced, where it alone is int8: relative L2
    kept: bool  # in float
    why: str


class Found(NamedTuple):
    """The outcome of a search."""

    keep: list[str]  # entries of a recipe
    layers: list[LayerSensitivity]
    cost: Mapping[str, Any] = {}  # what a check's layers in float changed, for the manifest

    def then(self, later: Found) -> Found:
        """Return the outcome of both searches; what the later one found fixed has the reason of this one."""
        why = {layer.layer: layer.why for layer in self.layers if layer.kept}
        layers = [layer._replace(why=why.get(layer.layer, layer.why)) for layer in later.layers]
        cost = {**self.cost, **later.cost}
        if self.cost and later.cost:
            cost |= {key: [*self.cost[key], *later.cost[key]] for key in ("layers", "gates")}
            if "step_time" in cost:  # the later one is timed against what this one kept
                cost["step_time"] = round(self.cost["step_time"] * later.cost["step_time"], 3)
        return Found(later.keep, layers, cost)


class Search:
    """Try other forms of the step stage of the bundle in `folder`, whose other stages stay what they are.

    Forms are written to a folder of their own in there. Closing it closes its engines and removes that folder.
    `decode` is PyTorch's decoder, which a budget in PSNR needs.
    """

    def __init__(
        self,
        folder: Path,
        contract: Manifest,
        smoothed: Smoothed,
        network: Network,
        tick: Tick,
        decode: Decode | None = None,
    ) -> None:
        self._folder, self._smoothed, self._tick, self._decode = folder, smoothed, tick, decode
        self._kind, self._form = contract.step.precision, contract.step.backend
        # Engines of other backends do not run where they are built; the portable graphs do.
        self._backend = self._form if self._form in backends.CPU else PORTABLE_BACKEND
        self._work = folder / "search"
        self._count = 0  # of the forms that were tried
        self._condition, self._null = fixtures.conditions(network, SAMPLES), fixtures.null(network)
        self.layers = find(smoothed.denoiser)
        in_int8 = self._form in attention.BACKENDS
        self.names = [name for name in everything(self.layers) if in_int8 or not name.endswith(ATTENTION)]
        with ExitStack() as stack:
            self._contract = contract
            if self._form != self._backend:
                stages = tuple(stack.enter_context(portable(folder, stage)) for stage in contract.stages)
                self._contract = replace(contract, stages=stages)
            self._work.mkdir()
            stack.callback(shutil.rmtree, self._work)
            onnxfile.save(smoothed.denoiser, self._work / self._contract.step.onnx)
            self._others = stack.enter_context(Pipeline(folder, self._contract, {}))
            for stage in (*self._contract.before_loop, *filter(None, [self._contract.end])):
                self._others.engines.open(stage)
            self._resources = stack.pop_all()

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def run(self, options: SearchOptions, fixed: Sequence[str]) -> Found:
        """Return what stays float: `fixed`, what int8 does not speed up, and the fewest that the budget needs."""
        keep = list(fixed)
        why = dict.fromkeys(named(self.layers, fixed), "the recipe keeps it")
        if options.tune:
            for sort, ratio in self.speed().items():
                if ratio >= FASTER and sort not in keep:
                    keep.append(sort)
                    why |= dict.fromkeys(
                        named(self.layers, [sort]), f"float {sort} is {ratio:.2f} times as fast a step"
                    )
        check = None if options.budget is None else self._ends_within(options.budget)
        try:
            return self._least(check, f"budget {options.budget}", keep, why)
        except OutOfReach as error:
            end = self._contract.end
            if end is None or end.precision != "int8" or error.figure.metric != "PSNR":
                raise
            text = f"{error}; the decoder in int8 is a part of this distance: try --keep-float decoder"
            raise OutOfReach(text, error.figure) from None

    def meet(self, check: Check, name: str, fixed: Sequence[str], broken: Sequence[Figure]) -> Found:
        """Return what stays float: `fixed`, and the fewest layers more with which the check holds.

        `broken` are its figures with none more in float.
        """
        why = dict.fromkeys(named(self.layers, fixed), "the recipe keeps it")
        return self._least(check, name, list(fixed), why, broken)

    def _least(
        self, check: Check | None, name: str, keep: list[str], why: dict[str, str], broken: Sequence[Figure] = ()
    ) -> Found:
        """Keep the fewest layers in float with which the check holds, found by halving.

        Those with the largest error a token are first: the fewer tokens a layer has, the less it costs in float.
        `why` has the layers that stay float anyway.
        """
        free, figures = [layer for layer in self.names if layer not in why], dict[int, Sequence[Figure]]()

        def holds(order: list[str], count: int) -> bool:
            assert check is not None
            if count not in figures:
                with self._opened([*why, *order[:count]], self._kind) as pipe:
                    figures[count] = check(pipe)
            return all(figure.passed for figure in figures[count])

        if broken:
            figures[0] = broken
        fits = check is None or holds(free, 0)
        if not fits and not holds(free, len(free)):
            figure = first_broken(figures[len(free)])
            text = f"{name} does not hold on {self._form} even with every layer in float: {sentence(figure)}"
            raise OutOfReach(text, figure)
        errors = self._rank()
        count = tokens(self.layers)
        order = sorted(free, key=lambda name: -errors[name] / count[name])
        high = 0 if fits else fewest(len(free), lambda count: holds(order, count))
        if high == len(free) and free:
            figure = first_broken(figures[high - 1])
            text = f"{name} holds on {self._form} with no layer in {self._kind} only: with {order[-1]} alone in it, "
            raise OutOfReach(text + sentence(figure), figure)
        text = "no budget was asked for" if check is None else f"{name} holds"
        cost: dict[str, Any] = {}
        if check is not None and high:
            why |= dict.fromkeys(order[:high], compared(figures[high - 1], figures[high], f"with it in {self._kind}"))
            cost = self._cost(order[:high], [*why], figures[0], figures[high])
        elif check is not None:
            text += f": {worst(figures[0])[0].value:.4g}"
        layers = [LayerSensitivity(name, errors[name], name in why, why.get(name, text)) for name in self.names]
        return Found([*keep, *order[:high]], layers, cost)

    def _cost(
        self, names: list[str], in_float: list[str], before: Sequence[Figure], after: Sequence[Figure]
    ) -> dict[str, Any]:
        """Return what these layers in float changed: the figures that broke, and the time of a guided step."""
        now = {figure.name: figure for figure in worst(after)}
        broken = [figure for figure in worst(before) if not figure.passed]
        gates = [
            {
                "name": figure.name,
                "limit": figure.limit,
                "before": jsonable(figure.value),
                "after": jsonable(now[figure.name].value) if figure.name in now else None,
            }
            for figure in broken
        ]
        cost: dict[str, Any] = {"layers": names, "of": len(self.names), "gates": gates}
        if self._form == self._backend:
            already = [name for name in in_float if name not in names]
            with self._opened(in_float, self._kind) as mixed, self._opened(already, self._kind) as quantized:
                cost["step_time"] = round(_ratio(self._step(mixed), self._step(quantized)), 3)
        return cost

    def speed(self) -> dict[str, float]:
        """Return, by kind of layer, how many times as fast a guided step is where all of that kind are float."""
        ratios = {}
        kinds = list(dict.fromkeys(map(kind, self.names)))
        with self._opened([], self._kind) as quantized:
            for done, sort in enumerate(kinds):
                self._tick(done, len(kinds))
                with self._opened(named(self.layers, [sort]), self._kind) as mixed:
                    ratios[sort] = _ratio(self._step(quantized), self._step(mixed))
        return ratios

    def _step(self, pipe: Pipeline) -> Callable[[], object]:
        time, noise = self._contract.process.span / 2, np.random.default_rng(SEED)
        state = noise.normal(size=(1, *self._contract.state.shape)).astype(np.float32)
        weights = np.full(1, self._contract.guidance.default, np.float32)
        away = self._null if self._contract.mixes_guidance else None
        inputs = pipe.engines.inputs(np.array([time]), self._first_condition, away, weights)
        return lambda: pipe.engines.denoise(state, inputs, 0)

    @property
    def _first_condition(self) -> Rows:
        return {name: rows[:1] for name, rows in self._condition.items()}

    def _rank(self) -> dict[str, float]:
        """Return, by layer, the error of the predictions where that layer alone is int8, in fp32 around it."""
        names, errors = self.names, {}
        with self._opened(names, "fp32") as exact:
            trajectory = self._trajectory(exact)
            expected = self._answers(exact, trajectory)
        for done, name in enumerate(names):
            self._tick(done, len(names))
            with self._opened([other for other in names if other != name], "fp32") as pipe:
                errors[name] = relative_error(self._answers(pipe, trajectory), expected)
        return errors

    def _answers(self, pipe: Pipeline, trajectory: Sequence[Latents]) -> Latents:
        """Return the predictions for a condition and for the null one, each by itself."""
        process = self._contract.process
        times = plan(process, process.sampler.solver, STEPS)[list(ASKED)]
        own, weights = self._first_condition, np.ones(2, np.float32)
        both = {name: np.concatenate([own[name], rows]) for name, rows in self._null.items()}
        inputs = pipe.engines.inputs(times, both, None, weights)
        answers = []
        for index, step in enumerate(ASKED):
            x = np.repeat(trajectory[step - 1][:1], 2, axis=0)  # after a step stands what the next one sees
            answers.append(pipe.engines.denoise(x, inputs, index)[0])
        return np.concatenate(answers)

    def _trajectory(self, pipe: Pipeline) -> list[Latents]:
        """Return the latents after each step of a run of the sampler itself."""
        states: list[Latents] = []
        pipe.sample(
            condition=self._condition,
            negative=self._null if self._contract.without_null else None,
            steps=STEPS,
            seed=[SEED + index for index in range(SAMPLES)],
            output="latents",
            on_step=lambda done, steps, x: states.append(x.astype(np.float32)),
        )
        return states

    def _ends_within(self, budget: Budget) -> Check:
        """Return the check of how far whole runs end from those in fp32."""
        with self._opened(self.names, "fp32") as pipe:
            exact = self._trajectory(pipe)[-1]
        if budget.metric == "PSNR":  # the bundle's decoder is not fp32's, and its error counts
            assert self._decode is not None
            exact = self._decode(exact)
        return lambda pipe: [budget.figure(self._distance(budget, self._trajectory(pipe)[-1], exact))]

    def _distance(self, budget: Budget, latents: Latents, exact: NDArray[np.float32]) -> float:
        """Return how far the worst sample is from `exact`: latents, or for a PSNR their pictures."""
        if budget.metric == "latent-rel-l2":
            return max(relative_error(*pair) for pair in zip(latents, exact, strict=True))
        pictures = (images.to_uint8(pictures) for pictures in (self._others.engines.decode(latents), exact))
        return min(images.psnr(*pair) for pair in zip(*pictures, strict=True))

    @contextmanager
    def _opened(self, keep: Collection[str], precision: str) -> Iterator[Pipeline]:
        """Open the bundle with all layers in int8 but those to keep, and the float of `precision` around them."""
        graph = self._smoothed.denoiser.copy()
        grids = attention.steps(graph, self._smoothed.calibration, keep)
        quantize(graph, self._smoothed.chosen, keep, self._kind)
        own = self._form == self._backend
        for rewrite in attention.passes(self._backend, grids) if own else (plain_attention,):
            rewrite(graph)
        path = self._work / f"tried-{self._count}.onnx"  # beside the weights that all of them share
        self._count += 1
        with onnxfile.temporary(graph, path) as files:
            names = tuple(file.relative_to(self._folder).as_posix() for file in files)
            step = replace(self._contract.step, precision=precision, engines={self._backend: names})
            stages = (step if stage.runs == "step" else stage for stage in self._contract.stages)
            pipe = Pipeline(self._folder, replace(self._contract, stages=tuple(stages)), self._others.engines.opened)
            if not own:  # this backend may not have the precision by name
                options = Options(precision=self._kind)
                pipe.engines.opened[step.name] = backends.backend(self._backend).open(files, options)
            with closing(pipe.engines.open(step)):
                yield pipe


def first_broken(figures: Sequence[Figure]) -> Figure:
    return next(figure for figure in worst(figures) if not figure.passed)


def compared(broken: Sequence[Figure], held: Sequence[Figure], what: str) -> str:
    """Return what broke first, with its value before and after."""
    figure = first_broken(broken)
    after = {other.name: other.value for other in worst(held)}.get(figure.name)
    text = f"{sentence(figure)}: {what}"
    return text if after is None else f"{text}, {after:.4g} without"


def _ratio(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """Return how many times as fast the second is: both are called in turn, and the median of the rounds counts."""
    ratios = []
    for round_ in range(ROUNDS + 1):
        seconds = []
        for call in (slow, fast):
            began = clock()
            call()
            seconds.append(clock() - began)
        if round_:  # the first compiles
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)
