"""From labels to pictures: the bundle's graphs around a solver."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime import backends, images
from dit_runtime.backends import Engine, Options, Resident
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.captions import Captions, Context, Contexts, examples, fitting
from dit_runtime.conditioning import Table
from dit_runtime.errors import BundleError, EngineError, UsageError
from dit_runtime.labels import class_number
from dit_runtime.sampling import loops, noise
from dit_runtime.sampling.solvers import linear, plan, solve

OnStep = Callable[[int, int, NDArray[np.float64]], Any]


def _cache(contract: Manifest) -> Path | None:
    """Where backends keep what they compile of this bundle: in the user's cache, by what the bundle holds."""
    import hashlib  # here, so that importing the runtime stays quick

    content = "".join(f"{name} {file.sha256}\n" for name, file in sorted(contract.files.items()))
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return None
    return Path(home) / "dit-run" / hashlib.sha256(content.encode()).hexdigest()[:32]


class Stopped(Exception):
    """`on_step` asked to stop the run."""


class Pipeline:
    def __init__(
        self, folder: Path, contract: Manifest, engines: Mapping[str, Engine], options: Options | None = None
    ) -> None:
        self.folder, self.manifest = folder, contract
        self._engines, self._options = dict(engines), options or Options()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        threads: int | None = None,
        provider: str | None = None,
        low_memory: bool = False,
    ) -> Pipeline:
        """Opens a bundle, after its manifest and the sha256 of each file that is opened have been checked.

        With `low_memory` only one graph is open at a time, and only while it is needed.
        """
        folder = Path(folder)
        contract = manifest.read(folder)
        files = {file: None for graph in contract.graphs.values() for file in graph.files}  # in order, each once
        manifest.check_files(folder, contract, files)
        cache = None if low_memory else _cache(contract)  # to read what is kept takes more memory than to compile
        options = Options(threads=threads, provider=provider, cache=cache, low_memory=low_memory)
        pipe = cls(folder.absolute(), contract, {}, options)  # graphs may be opened later, from another directory
        with ExitStack() as undo:
            undo.callback(pipe.close)
            for name in () if low_memory else contract.graphs:
                if name != "update":  # which is opened where it is needed
                    pipe._engine(name)
            undo.pop_all()
        return pipe

    def _engine(self, name: str) -> Engine:
        """The graph's engine, opened where it is not; in low memory the others make room."""
        if name not in self._engines:
            graph = self.manifest.graphs[name]
            if self._options.low_memory:
                self.close()
                if name == "conditioner" and backends.versions()[backends.LEANEST]:
                    graph = replace(graph, backend=backends.LEANEST)
                    manifest.check_files(self.folder, self.manifest, graph.files)
            module = backends.backend(backends.choose(graph.backend, graph.precision))
            files = [manifest.inside(self.folder, file) for file in graph.files]
            settings = replace(self._options, precision=graph.precision, built=manifest.built(self.manifest, name))
            if name == "denoiser":
                settings = replace(settings, guided_channels=self.manifest.guided_channels)
            if name == "update":
                settings = replace(settings, beside=self._engines["denoiser"])
            engine: Engine = module.open(files, settings)
            expected = [sorted(spec.name for spec in specs) for specs in (graph.inputs, graph.outputs)]
            if (found := [sorted(names) for names in engine.io]) != expected:
                engine.close()
                raise BundleError(f"{self.folder}: {name} has inputs and outputs {found}, expected {expected}")
            self._engines[name] = engine
        return self._engines[name]

    def _run(self, name: str, inputs: Mapping[str, Any], *into: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """The engine's answer; with `into`, it goes there and stays with the engine."""
        engine = self._engine(name)
        try:
            return engine.run(inputs, *into)
        except (UsageError, EngineError):
            raise
        except Exception as error:  # each backend has exceptions of its own; memory that ran out is one of them
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise EngineError(f"the {name}'s engine failed: {reason}") from error

    def sample(
        self,
        labels: str | int | Sequence[str | int] = (),
        *,
        captions: Captions | NDArray[Any] | None = None,
        negative: Captions | NDArray[Any] | None = None,
        steps: int = 25,
        guidance: float | Sequence[float] = 4.0,
        seed: int | Sequence[int] = 0,
        solver: str | None = None,
        eta: float = 0.0,
        spacing: str | None = None,
        latents: NDArray[Any] | None = None,
        output: str = "images",
        on_step: OnStep | None = None,
    ) -> NDArray[Any]:
        """Pictures uint8 [N, H, W, 3], or final latents float32 [N, C, H, W]; one a label, the same for the same seed.

        A captioned bundle takes `captions` as its text encoder embedded them, (N, L, C), and with guidance `negative`,
        one for all or one each; labels are then the numbers of its example captions.
        `on_step(step, steps, latents)` is called after each evaluation of the network, of which a step of Heun's method
        needs two; returning True raises Stopped.
        """
        if output not in ("images", "latents"):
            raise UsageError(f"output {output!r} is not known; known: images, latents")
        if output == "images":
            self._require_decoder()
        named = [labels] if isinstance(labels, str | int | np.integer) else list(labels)
        if captions is None:
            if negative is not None:
                raise UsageError("negative captions without captions; pass both, or labels alone")
            ids = self.label_ids(named)
        else:
            if named:
                raise UsageError("got both labels and captions: pass one of them")
            captions = self._fitting(captions, "captions")
            ids = [self.manifest.null_label] * len(captions.mask)
        weights = self._guidance(guidance, len(ids))
        solver = solver or self.manifest.diffusion.sampler.solver
        timesteps = plan(self.manifest.diffusion, solver, steps, spacing)
        draw = noise.draw(seed, len(ids))
        shape = (len(ids), *self.manifest.latent_shape)
        x = draw(shape) if latents is None else self._latents(latents, shape)
        run = solve(self.manifest.diffusion, solver, steps, x, draw, eta=eta, spacing=spacing)

        guided = self.is_guided(weights)
        contexts = self.examples(ids, guided) if captions is None else self._contexts(captions, negative, guided)
        table = self.table(timesteps, ids, guided)
        size, weights = self.manifest.graphs["denoiser"].max_batch, self._put(weights)

        def given(step: int, samples: slice) -> dict[str, Any]:
            return {"conditioning": table(step, samples), "guidance": weights[samples], **contexts(samples)}

        denoiser, update = self._residents()
        matrices = None if update is None else linear(self.manifest.diffusion, solver, steps, eta=eta, spacing=spacing)
        if denoiser is None or update is None or matrices is None:
            done = loops.with_solver(run, timesteps, partial(self._run, "denoiser"), given, size)
        else:
            engines = denoiser.put, partial(self._run, "denoiser"), partial(self._run, "update")
            done = loops.with_matrices(matrices, *engines, x, given, size)
        for step, home in enumerate(done):
            if on_step is not None and on_step(step + 1, len(timesteps), home()) is True:
                raise Stopped(f"stopped after step {step + 1} of {len(timesteps)}")
        state = home()
        if output == "latents":
            return state.astype(np.float32)
        return images.to_uint8(self.decode(state))

    def table(self, timesteps: Sequence[float] | NDArray[Any], ids: Sequence[int], guided: bool) -> Table:
        graph = self.manifest.graphs["conditioner"]
        row_bytes = 4 * math.prod(int(size) for size in graph.outputs[0].shape[1:])
        null_label = self.manifest.null_label if guided else None
        # In low memory all of it at once, so that the conditioner can be closed.
        how: dict[str, Any] = {"whole": self._options.low_memory, "put": self._put}
        return Table(self.condition, list(timesteps), ids, null_label, row_bytes, graph.max_batch, **how)

    def condition(self, timesteps: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[Any]:
        """(N,), (N,) -> [N, K, D]; where there are captions, labels change nothing."""
        size = self.manifest.graphs["conditioner"].max_batch
        inputs = {"timesteps": timesteps} | ({} if self.manifest.caption_shape else {"labels": labels})
        parts = []
        for first in range(0, len(timesteps), size):
            some = {name: rows[first : first + size] for name, rows in inputs.items()}
            parts.append(self._run("conditioner", some)["conditioning"])
        return np.concatenate(parts)

    def context(self, captions: Captions) -> Context:
        """(N, L, C), (N, L) -> [N, M, D], [N, L]."""
        size = self.manifest.graphs["context"].max_batch
        parts = []
        for first in range(0, len(captions.mask), size):
            embeddings, mask = (part[first : first + size] for part in captions)
            found = self._run("context", {"captions": embeddings, "mask": mask})
            parts.append((found["context"], found["context_mask"]))
        return Context(*map(np.concatenate, zip(*parts, strict=True)))

    def examples(self, numbers: Sequence[int], guided: bool) -> Contexts:
        """Of example captions; nothing where numbers are those of classes."""
        shape = self.manifest.caption_shape
        if shape is None:
            return Contexts()
        null = self.context(examples([self.manifest.null_label], *shape)) if guided else None
        return Contexts(self.context(examples(numbers, *shape)), null, self._put)

    def denoise(
        self,
        latents: NDArray[Any],
        conditioning: NDArray[Any],
        guidance: NDArray[np.float32],
        context: Mapping[str, NDArray[Any]] | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """[B, C, H, W], [G, B, K, D], [B] -> guided prediction and, where it is learned, variance, [B, C, H, W]."""
        size = self.manifest.graphs["denoiser"].max_batch
        grouped = {"conditioning": conditioning, **(context or {})}  # (G, B, ...)
        parts = []
        for first in range(0, len(latents), size):
            samples = slice(first, first + size)
            inputs = {"latents": latents[samples].astype(np.float32), "guidance": guidance[samples]}
            parts.append(self._run("denoiser", inputs | {name: rows[:, samples] for name, rows in grouped.items()}))
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return whole["prediction"], whole.get("variance")

    def decode(self, latents: NDArray[Any]) -> NDArray[Any]:
        """[N, C, H, W] -> [N, 3, 8H, 8W] in [0, 1]."""
        self._require_decoder()
        size = self.manifest.graphs["decoder"].max_batch
        parts = []
        for first in range(0, len(latents), size):
            parts.append(self._run("decoder", {"latents": latents[first : first + size].astype(np.float32)})["images"])
        pictures = np.concatenate(parts)
        if not np.isfinite(pictures).all():
            raise EngineError("the decoder's pictures hold values that are not finite")
        return pictures

    def _residents(self) -> tuple[Resident | None, Resident | None]:
        """The denoiser's and the update's engines, where arrays can stay with them."""
        if self._options.low_memory or not isinstance(denoiser := self._engine("denoiser"), Resident):
            return None, None
        update = self._engine("update") if "update" in self.manifest.graphs else None
        return denoiser, update if isinstance(update, Resident) else None

    def _put(self, values: NDArray[Any]) -> Any:
        """What every step reads, to where it is read."""
        denoiser, _ = self._residents()
        return np.asarray(values) if denoiser is None else denoiser.put(values)

    def _fitting(self, captions: Captions | NDArray[Any], what: str) -> Captions:
        shape = self.manifest.caption_shape
        if shape is None:
            raise UsageError(f"this bundle takes labels, 0 to {self.manifest.num_classes - 1}, and no {what}")
        return fitting(captions, *shape, what)

    def _contexts(self, captions: Captions, negative: Captions | NDArray[Any] | None, guided: bool) -> Contexts:
        if not guided:
            return Contexts(self.context(captions), put=self._put)
        if negative is None:
            raise UsageError("guidance needs negative=, the embedding of an empty text; or pass guidance 1")
        null = self._fitting(negative, "negative captions")
        if len(null.mask) not in (1, len(captions.mask)):
            raise UsageError(
                f"{len(null.mask)} negative captions; expected one, or one for each of {len(captions.mask)}"
            )
        return Contexts(self.context(captions), self.context(null), self._put)

    def label_ids(self, labels: Sequence[str | int]) -> list[int]:
        """Class numbers of names ("golden retriever", one of its synonyms, or "207") and numbers."""
        if not labels:
            other = "; or captions" if self.manifest.caption_shape else ""
            raise UsageError(f"no labels; pass at least one class name or number{other}")
        return [class_number(label, self.manifest.labels, self.manifest.num_classes) for label in labels]

    def is_guided(self, weights: NDArray[np.float32]) -> bool:
        """Whether the null rows are needed: not where they cannot change the result."""
        alone = weights <= 1 if self.manifest.unguided_up_to_one else weights == 1
        return not alone.all()

    def _guidance(self, guidance: float | Sequence[float], count: int) -> NDArray[np.float32]:
        try:
            with np.errstate(over="ignore"):  # too big for float32 is inf, and refused as that
                weights = np.asarray(guidance, np.float32)
        except (TypeError, ValueError):
            raise UsageError(f"guidance is {guidance!r}; expected one number, or one a label") from None
        if weights.ndim > 1 or (weights.ndim == 1 and len(weights) != count):
            raise UsageError(f"guidance has shape {weights.shape}; expected one number or {count}, one a label")
        if not np.isfinite(weights).all():
            raise UsageError(f"guidance is {guidance}; expected finite numbers")
        if self.manifest.unguided_up_to_one:
            weights = np.maximum(weights, 1)  # as it would be alone: a sample does not depend on its batch
        return np.broadcast_to(weights, (count,)).copy()

    def _latents(self, latents: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        if latents.shape != shape or not np.isfinite(latents).all():
            raise UsageError(f"latents have shape {latents.shape}; expected {shape}, all finite")
        return latents

    def _require_decoder(self) -> None:
        if "decoder" not in self.manifest.graphs:
            raise UsageError('this bundle has no decoder; ask for output="latents" (dit-run: -o FILE.npy)')

    def close(self) -> None:
        with ExitStack() as stack:  # every engine, whichever fails; the update's, which works in the denoiser's stream,
            for engine in self._engines.values():  # is opened last and closed first
                stack.callback(engine.close)
            self._engines.clear()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
