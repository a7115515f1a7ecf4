"""A bundle's engines, opened where they are needed: any stage by name, the step stage in batches, the pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime import backends
from dit_runtime.backends import Engine, Options, Resident
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest, Stage, State
from dit_runtime.bundle.records import BEFORE_LOOP
from dit_runtime.conditions.condition import Rows, group
from dit_runtime.conditions.memo import BUDGET, Compute, Device, StepInputs
from dit_runtime.conditions.text import PromptMemo, Tokenizers
from dit_runtime.errors import BundleError, EngineError, NotFinite, UsageError
from dit_runtime.sampling.guidance import Groups

if TYPE_CHECKING:
    from concurrent.futures import Future

AT_ONCE = {"start": 1, "step": 2, "end": 1}  # rows: two of a VAE would need twice the memory for their activations


class Engines:
    def __init__(self, folder: Path, contract: Manifest, opened: Mapping[str, Engine], options: Options) -> None:
        """Open nothing yet; `opened` has engines by stage, which are closed with the others."""
        self.folder, self.manifest, self.options = folder, contract, options
        self._opened = dict(opened)
        self._ahead: dict[str, Future[Engine]] = {}  # by stage, until it is first used
        self.compute: Compute = self.run  # for the stages before the loop; a service shares what they give
        self.memo_bytes = BUDGET  # of each memo of a run
        self.tokenizers = Tokenizers(folder, contract)
        self._prompts = PromptMemo(contract.prompt, self.run) if contract.prompt else None
        self.checked: dict[str, State] | None = None  # files whose sums were right when they were last opened

    def at(self, size: str | int | None) -> Engines:
        """Return the engines of a size of the bundle; what is open is open for all sizes."""
        manifest = self.manifest.at(size)
        if manifest is self.manifest:
            return self
        sized = copy(self)
        sized.manifest = manifest
        return sized

    @property
    def opened(self) -> dict[str, Engine]:
        """The engines that are open, by stage, after a wait for those that open in the background."""
        for name in [*self._ahead]:
            self._settle(name)
        return self._opened

    def open(self, stage: Stage) -> Engine:
        """Return the stage's engine; in low memory the others are closed before it is opened."""
        if stage.name not in self._opened:
            if self.options.low_memory:
                self.close()
            if stage.name in self._ahead:
                self._settle(stage.name)
            else:
                self._opened[stage.name] = self._engine(stage)
        return self._opened[stage.name]

    def _settle(self, name: str) -> None:
        """Wait for a stage that opens in the background; one that failed is opened again at its next use."""
        ahead = self._ahead[name]
        if error := ahead.exception():  # an interrupted wait leaves it where close() finds it
            del self._ahead[name]
            raise error
        self._opened[name] = ahead.result()
        del self._ahead[name]

    def open_ahead(self, stages: Iterable[Stage]) -> None:
        """Begin to open stages in the background, one after the other.

        The first use of a stage waits for it. An error is raised by the next call of `run`, whichever stage that runs.
        """
        from concurrent.futures import ThreadPoolExecutor  # here, so that importing the runtime stays quick

        pool = ThreadPoolExecutor(1)
        self._ahead |= {stage.name: pool.submit(self._engine, stage) for stage in stages}
        pool.shutdown(wait=False)

    def _engine(self, stage: Stage) -> Engine:
        """Open a stage while the sums of its files are compared."""
        if self.options.low_memory:
            stage = self._lean(stage)
        if stage.runs == "prompt" and not backends.backend(stage.backend).version():
            # Only the loop's backend is installed here.
            stage = replace(stage, backend=self.manifest.step.backend)
        module = backends.backend(backends.choose(stage.backend, stage.precision))
        names = backends.files(stage, self.options)
        files = [manifest.inside(self.folder, name) for name in names]
        with ExitStack() as undo:
            with self._checking(names):
                engine: Engine = module.open(files, self._settings(stage))
                undo.callback(engine.close)
                expected = [sorted(spec.name for spec in specs) for specs in (stage.reads, stage.gives)]
                if (io := [sorted(side) for side in engine.io]) != expected:
                    raise BundleError(f"{self.folder}: {stage.name} has inputs and outputs {io}, expected {expected}")
            undo.pop_all()
        return engine

    def _checking(self, names: Sequence[str]) -> AbstractContextManager[None]:
        if self.checked is None:  # of a build, whose files are its own
            return nullcontext()
        return manifest.checking(self.folder, self.manifest, names, self.checked)

    def _lean(self, stage: Stage) -> Stage:
        """Give a stage before the loop the backend that needs the least memory to load, where that is installed."""
        lean = backends.LEANEST
        if stage.runs not in ("prompt", *BEFORE_LOOP) or not backends.versions()[lean]:
            return stage
        if stage.precision not in backends.backend(lean).PRECISIONS:
            return stage
        return replace(stage, backend=lean)

    def _settings(self, stage: Stage) -> Options:
        settings = replace(
            self.options,
            precision=stage.precision,
            streamed=stage.runs == "prompt" and stage.precision == "fp32",
            built=manifest.built(self.manifest, stage),
        )
        if stage.runs in AT_ONCE:
            grouped = tuple(spec.name for spec in stage.grouped)
            row = {
                spec.name: tuple(1 if isinstance(size, str) else size for size in spec.shape) for spec in stage.reads
            }
            settings = replace(settings, row=row, grouped=grouped, at_once=AT_ONCE[stage.runs])
        return replace(settings, beside=self._beside(stage))

    def _beside(self, stage: Stage) -> Resident | None:
        """Return an open `Resident` engine of the same backend, whose stream a new one shares; None without one."""
        stages = (other for size in self.manifest.each_size for other in size.stages)
        same = {other.name for other in stages if other.backend == stage.backend}
        engines = (engine for name, engine in self._opened.items() if name in same)
        return next((engine for engine in engines if isinstance(engine, Resident)), None)

    def run(self, stage: Stage, inputs: Mapping[str, Any], *into: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Return the engine's outputs in the manifest's shapes; with `into`, they go there and stay with the engine."""
        for failed in [ahead for ahead in self._ahead.values() if ahead.done() and ahead.exception()]:
            failed.result()
        engine = self.open(stage)
        if not isinstance(engine, Resident):
            inputs = {name: np.asarray(values) for name, values in inputs.items()}
        try:
            outputs = engine.run(inputs, *into)
        except (UsageError, EngineError):
            raise
        except Exception as error:  # each backend has exceptions of its own; memory that ran out is one of them
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise EngineError(f"the {stage.name}'s engine failed: {reason}") from error
        for spec in () if into else stage.gives:
            actual, expected = outputs[spec.name].shape, (stage.rows(inputs), *spec.shape[1:])
            if actual != expected:
                raise EngineError(f"the {stage.name}'s {spec.name} has shape {[*actual]}, expected {[*expected]}")
        return outputs

    def residents(self) -> tuple[Resident | None, Resident | None]:
        """Return the engines of step and update, where arrays can stay with them."""
        if self.options.low_memory or not isinstance(step := self.open(self.manifest.step), Resident):
            return None, None
        update = self.open(self.manifest.update) if self.manifest.update else None
        return step, update if isinstance(update, Resident) else None

    def encode(self, rows: Rows) -> Rows:
        """Return the condition ports' rows, those of token ids through the prompt stage, but for what is to come of a
        picture."""
        if self._prompts is None or self.manifest.prompts[0].ids not in rows:
            return rows
        rows = rows | self._prompts(rows)
        return {port.name: rows[port.name] for port in self.manifest.conditions if port.name in rows}

    def inputs(
        self,
        timesteps: NDArray[Any],
        condition: Rows,
        negative: Rows | None,
        weights: NDArray[np.float32],
        host: bool = False,
    ) -> StepInputs:
        """Return what the step stage reads at these timesteps, for samples with these conditions and weights.

        With `host` its arrays stay in the host's memory, whatever engine reads them.
        """
        rows, groups = group(len(weights), condition, negative)
        step = None if host else self.residents()[0]
        device = None if step is None else Device(step.put, step.empty, self._joins)
        # In low memory a stage's outputs are made at once, so that its engine can be closed.
        options: dict[str, Any] = {"whole": self.options.low_memory, "budget": self.memo_bytes}
        return StepInputs(self.manifest, self.compute, timesteps, rows, groups, weights, device=device, **options)

    def _joins(self, stage: Stage) -> bool:
        """Return whether a stage's engine can write where the step's engine reads."""
        return stage.backend == self.manifest.step.backend and isinstance(self.open(stage), Resident)

    def denoise(
        self, state: NDArray[Any], inputs: StepInputs, step: int, groups: Groups = Groups.BOTH
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """[B, *state] -> prediction, guided with both groups, and, where it is learned, variance, [B, *state]."""
        stage, parts = self.manifest.step, []
        for first in range(0, len(state), stage.max_batch):
            samples = slice(first, first + stage.max_batch)
            own = {self.manifest.state.name: state[samples].astype(np.float32)}
            parts.append(self.run(stage, own | inputs(step, samples, groups)))
        outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return outputs["prediction"], outputs.get("variance")

    def encode_pictures(self, pictures: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """[N, 3, H, W] in [0, 1] -> mean and, where the encoder gives it, logvar of their latents, [N, *state]."""
        stage, parts = self.manifest.require_start(), []
        for first in range(0, len(pictures), stage.max_batch):
            parts.append(self.run(stage, {"images": pictures[first : first + stage.max_batch]}))
        latents = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if not all(np.isfinite(values).all() for values in latents.values()):
            raise NotFinite(f"the {stage.name}'s latents hold values that are not finite")
        return latents

    def decode(self, state: NDArray[Any]) -> NDArray[Any]:
        """[N, *state] -> [N, 3, H, W] in [0, 1], of videos [N, 3, F, H, W]."""
        stage, parts = self.manifest.require_end(), []
        for first in range(0, len(state), stage.max_batch):
            some = state[first : first + stage.max_batch].astype(np.float32)
            parts.append(self.run(stage, {self.manifest.state.name: some})["images"])
        pictures = np.concatenate(parts)
        if not np.isfinite(pictures).all():
            raise NotFinite(f"the {stage.name}'s pictures hold values that are not finite")
        return pictures

    def close(self) -> None:
        """Close every engine, whichever fails; the update's, which works in the step's stream, is closed before it."""
        with ExitStack() as stack:
            for ahead in [ahead for ahead in self._ahead.values() if not ahead.cancel()]:  # those that wait go first
                if not ahead.exception():
                    stack.callback(ahead.result().close)
            for engine in self._opened.values():
                stack.callback(engine.close)
            self._opened.clear()
            self._ahead.clear()
