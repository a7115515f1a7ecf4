"""The pipeline from conditions to pictures: a bundle's stages around a solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime import cache, warming
from dit_runtime.backends import CPU, Engine, Options
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.engines import Engines
from dit_runtime.request import Request
from dit_runtime.run import Run

OnStep = Callable[[int, int, NDArray[np.float64]], Any]


class Pipeline:
    """A bundle that is open. Everything that runs its stages is in `engines`."""

    def __init__(
        self, folder: Path, contract: Manifest, engines: Mapping[str, Engine], options: Options | None = None
    ) -> None:
        self.folder = folder
        self.engines = Engines(folder, contract, engines, options or Options())

    def __repr__(self) -> str:
        return f"<Pipeline {self.folder.name}: {self.manifest.title}>"

    @property
    def manifest(self) -> Manifest:
        return self.engines.manifest

    def at(self, size: str | int | None) -> Pipeline:
        """Return this pipeline at another size of the bundle: requests without a size draw that one.

        Both have the same engines. Those of a size open when it is first drawn.
        """
        sized = copy(self)
        sized.engines = self.engines.at(size)
        return sized

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        size: str | int | None = None,
        threads: int | None = None,
        provider: str | None = None,
        low_memory: bool = False,
        warm: Sequence[int] = (),
        manifest_sha256: str = "",
        public_key: bytes | None = None,
    ) -> Pipeline:
        """Open a bundle; its manifest, and the sha256 of each file that is opened, are checked.

        Requests without a size draw `size`, by default the bundle's first. The engines of the others open when they are
        first asked for.
        On a CPU this returns when the step stage is open; the others are opened in the background then. With
        `low_memory` only one stage is open at a time, and only while it is needed. `warm` has batch sizes: every stage
        but the encoder of pictures runs at each of them, so that a later request of such a size compiles nothing. With
        `manifest_sha256` the bundle is the one whose manifest.json has this sum, or is refused. With `public_key`, the
        32 bytes of an Ed25519 key, the bundle is one that the key's owner has signed, or is refused.
        """
        folder = Path(folder)
        contract = manifest.read(folder, sum256=manifest_sha256, public_key=public_key).at(size)
        warming.require(contract, warm, low_memory)
        options = Options(threads=threads, provider=provider, cache=cache.folder_of(contract), low_memory=low_memory)
        pipe = cls(folder.absolute(), contract, {}, options)  # stages may be opened later, from another directory
        with ExitStack() as undo:
            undo.callback(pipe.close)
            pipe.engines.checked = {}
            if not low_memory:
                _open(pipe.engines)
            warming.warm(pipe.engines, warm)
            undo.pop_all()
        return pipe

    def run(self, request: Request, *, host: bool = False) -> Run:
        """Start a trajectory, to be stepped by the caller; by a batcher, on the `host`."""
        return Run(self.engines, request, host=host)

    def sample(
        self, labels: str | int | Sequence[str | int] = (), *, on_step: OnStep | None = None, **options: Any
    ) -> NDArray[Any]:
        """Return the result of a request; `options` are its fields.

        `on_step(step, steps, state)` is called after each step of the run; returning True raises Stopped.
        """
        run = self.run(Request(labels, **options))
        for _ in range(run.steps):
            run.step()
            if on_step is not None and on_step(run.done, run.steps, run.state) is True:
                run.cancel()
        return run.result()

    def close(self) -> None:
        self.engines.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(engines: Engines) -> None:
    """Open all stages but those that not every run needs: the update, and the encoder of pictures.

    On a CPU all but the step stage are opened in the background, after it: beside it they would slow it down.
    """
    contract = engines.manifest
    stages = [stage for stage in contract.stages if stage.runs not in ("start", "update")]
    if not engines.options.provider and all(stage.backend in CPU for stage in stages):
        engines.open(contract.step)
        engines.open_ahead(stage for stage in stages if stage is not contract.step)
        return
    for stage in stages:  # in their order: engines of a GPU share the stream of the first
        engines.open(stage)
