"""Search the token GEMMs that stay float: those that int8 does not speed up, and the worst until a budget holds."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_export.graph import onnxfile
from dit_export.networks import Network, fixtures
from dit_export.passes.attention import plain_attention
from dit_export.precision import attention
from dit_export.precision.calibrate import Calibration
from dit_export.precision.layers import ATTENTION, everything, find, named
from dit_export.precision.qdq import quantize
from dit_export.precision.smooth import smooth
from dit_runtime import backends, images
from dit_runtime.backends import PORTABLE_BACKEND, Engine, Options
from dit_runtime.bundle import manifest
from dit_runtime.conditions.condition import Rows
from dit_runtime.errors import UsageError
from dit_runtime.pipeline import Pipeline
from dit_runtime.sampling.solvers import plan
from dit_runtime.verify import relative_error

STEPS, GUIDANCE, SEED, SAMPLES = 10, 4.0, 2000, 2  # of the runs that are compared; the seed is no calibration's
ASKED = (1, 5, 9)  # of these steps, where each layer is tried alone: in noise, in between, nearly done
ROUNDS = 9  # of each pair that is timed
FASTER = 1.02  # less may be one measurement's difference from the next
Latents = NDArray[np.float32]
Tick = Callable[[int, int], None]


class Budget(NamedTuple):
    """The distance that the worst sample of a run may end from fp32's."""

    metric: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        metric, _, number = text.partition("=")
        try:
            limit = float(number)
        except ValueError:
            limit = 0.0
        if metric not in ("PSNR", "latent-rel-l2") or not limit > 0:
            raise UsageError(f"budget {text!r}; expected PSNR=DECIBELS or latent-rel-l2=ERROR, such as PSNR=35")
        return cls(metric, limit)

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.metric == "PSNR" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.metric}={self.limit:g}"


class SearchOptions(NamedTuple):
    """Options of the search that precedes quantization."""

    budget: Budget | None = None
    tune: bool = False

    def check(self, backend: str, has_decoder: bool) -> None:
        if self.budget is not None and self.budget.metric == "PSNR" and not has_decoder:
            raise UsageError(f"budget {self.budget} needs pictures, and there is no decoder; expected latent-rel-l2=…")
        if self.tune and backend not in backends.CPU:
            raise UsageError(f"--tune cannot time {backend} where it is built; expected {' or '.join(backends.CPU)}")


class LayerSensitivity(NamedTuple):
    """A layer in sensitivity.json."""

    layer: str
    error: float  # of the prediction, teacher-forced, where it alone is int8: relative L2
    kept: bool  # in float
    why: str


class Search:
    """Try forms of the fused fp32 graphs in `folder`.

    It works in a folder of its own in there. Closing it closes its engines and removes that folder.
    """

    def __init__(self, folder: Path, network: Network, calibration: Calibration, backend: str, tick: Tick) -> None:
        self._calibration = calibration
        self._work, self._contract, self._tick = folder / "search", manifest.read(folder), tick
        step, before, end = self._contract.step, self._contract.before_loop, self._contract.end
        self._denoiser = onnxfile.load(folder / step.onnx)
        graphs = {stage.name: onnxfile.load(folder / stage.onnx) for stage in before}
        self._chosen = smooth([*graphs.values()], self._denoiser, calibration)
        with ExitStack() as stack:
            self._work.mkdir()
            stack.callback(shutil.rmtree, self._work)

            def opened(files: Sequence[Path]) -> Engine:
                engine: Engine = backends.backend(PORTABLE_BACKEND).open(files, Options())
                stack.callback(engine.close)
                return engine

            onnxfile.save(self._denoiser, self._work / step.onnx)
            self._before: dict[str, Engine] = {}
            for name, graph in graphs.items():
                files = onnxfile.save(graph, self._work / f"{name}.onnx")
                self._before[name] = opened([self._work / file for file in files])
            self._decoder = opened([folder / end.onnx]) if end else None
            self._resources = stack.pop_all()
        self.layers = find(self._denoiser)
        in_int8 = backend in attention.BACKENDS
        self.names = [name for name in everything(self.layers) if in_int8 or not name.endswith(ATTENTION)]
        # Engines of other backends do not run where they are built; the portable graph does.
        self._form, self._backend = backend, backend if backend in backends.CPU else PORTABLE_BACKEND
        self._count = 0  # of the forms that were tried
        self._condition, self._null = fixtures.conditions(network, SAMPLES), fixtures.null(network)

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def run(self, options: SearchOptions, fixed: Sequence[str]) -> tuple[list[str], list[LayerSensitivity]]:
        """Return what stays float: `fixed`, what int8 does not speed up, and the worst until the budget holds."""
        names, keep = self.names, list(fixed)
        why = dict.fromkeys(named(self.layers, fixed), "the recipe keeps it")
        if options.tune:
            for kind, ratio in self.speed().items():
                if ratio >= FASTER and kind not in keep:
                    keep.append(kind)
                    why |= dict.fromkeys(
                        named(self.layers, [kind]), f"float {kind} is {ratio:.2f} times as fast a step"
                    )
        with self._opened(names, self._backend, "fp32") as exact:
            trajectory = self._trajectory(exact)
            errors = self._rank(exact, trajectory)
        order = sorted((name for name in names if name not in why), key=lambda name: -errors[name])
        text = "no budget was asked for"
        if options.budget is not None:
            count, values = self._within(options.budget, [*why], order, trajectory[-1])
            keep += order[:count]
            if count:
                last = f"{options.budget}: {values[count - 1]:.4g} with it in int8, {values[count]:.4g} without"
                why |= dict.fromkeys(order[:count], last)
            text = f"{options.budget} holds: {values[count]:.4g}"
        return keep, [LayerSensitivity(name, errors[name], name in why, why.get(name, text)) for name in names]

    def speed(self) -> dict[str, float]:
        """Return, by kind of layer, how many times as fast a guided step is where all of that kind are float."""
        ratios = {}
        kinds = list(dict.fromkeys(name.split()[-1] for name in self.names))
        with self._opened([], self._backend, "int8") as quantized:
            for done, kind in enumerate(kinds):
                self._tick(done, len(kinds))
                with self._opened(named(self.layers, [kind]), self._backend, "int8") as mixed:
                    ratios[kind] = _ratio(self._step(quantized), self._step(mixed))
        return ratios

    def _step(self, pipe: Pipeline) -> Callable[[], object]:
        time, noise = self._contract.process.span / 2, np.random.default_rng(SEED)
        state = noise.normal(size=(1, *self._contract.state.shape)).astype(np.float32)
        weights = np.full(1, GUIDANCE, np.float32)
        inputs = pipe.engines.inputs(np.array([time]), self._first_condition, self._null or None, weights)
        return lambda: pipe.engines.denoise(state, inputs, 0)

    @property
    def _first_condition(self) -> Rows:
        return {name: rows[:1] for name, rows in self._condition.items()}

    def _rank(self, exact: Pipeline, trajectory: Sequence[Latents]) -> dict[str, float]:
        """Return, by layer, the error of the predictions where that layer alone is int8."""
        names = self.names
        expected, errors = self._answers(exact, trajectory), {}
        for done, name in enumerate(names):
            self._tick(done, len(names))
            with self._opened([other for other in names if other != name], self._backend, "fp32") as pipe:
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
        seen: list[Latents] = []
        pipe.sample(
            condition=self._condition,
            negative=self._null if self._contract.without_null else None,
            steps=STEPS,
            guidance=GUIDANCE,
            seed=[SEED + index for index in range(SAMPLES)],
            output="latents",
            on_step=lambda done, steps, x: seen.append(x.astype(np.float32)),
        )
        return seen

    def _within(
        self, budget: Budget, fixed: list[str], order: list[str], exact: Latents
    ) -> tuple[int, dict[int, float]]:
        """Find by halving the fewest of the worst layers that must stay float; return them and what each count gave."""
        values: dict[int, float] = {}

        def holds(count: int) -> bool:
            with self._opened([*fixed, *order[:count]], self._backend, "int8") as pipe:
                values[count] = self._distance(budget, self._trajectory(pipe)[-1], exact)
            return budget.holds(values[count])

        low, high = -1, len(order)  # the budget breaks with `low` of them in float, and holds with `high`
        for count in (0, high):
            if holds(count):
                high = count
                break
            low = count
        if low == high:
            raise UsageError(
                f"budget {budget} does not hold on {self._form} even with every layer in float: {values[high]:.4g}"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        if high == len(order) and order:
            raise UsageError(f"budget {budget} holds with no layer in int8 only; build fp32, or ask for less")
        return high, values

    def _distance(self, budget: Budget, latents: Latents, exact: Latents) -> float:
        if budget.metric == "latent-rel-l2":
            return max(relative_error(*pair) for pair in zip(latents, exact, strict=True))
        assert self._decoder is not None
        pictures = [
            images.to_uint8(self._decoder.run({self._contract.state.name: x})["images"]) for x in (latents, exact)
        ]
        return min(images.psnr(*pair) for pair in zip(*pictures, strict=True))

    @contextmanager
    def _opened(self, keep: Collection[str], backend: str, precision: str) -> Iterator[Pipeline]:
        """Open the denoiser as it is built, with all layers in int8 but those to keep, and `precision` around them."""
        graph = self._denoiser.copy()
        grids = attention.steps(graph, self._calibration, keep)
        quantize(graph, self._chosen, keep)
        for rewrite in attention.passes(backend, grids) if backend == self._form else (plain_attention,):
            rewrite(graph)
        path = self._work / f"tried-{self._count}.onnx"  # beside the weights that all of them share
        self._count += 1
        with onnxfile.temporary(graph, path) as files:
            engine = backends.backend(backend).open(files, Options(precision=precision))
            with closing(engine):
                yield Pipeline(self._work, self._contract, {**self._before, self._contract.step.name: engine})


def _ratio(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """Return how many times as fast the second is: both are called in turn, and the median of the rounds counts."""
    ratios = []
    for round_ in range(ROUNDS + 1):
        seconds = []
        for call in (slow, fast):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        if round_:  # the first compiles
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)
