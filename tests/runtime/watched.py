"""Pipelines whose engines a test watches, changes or lets fail."""

from __future__ import annotations

from dataclasses import replace

from dit_runtime import Pipeline
from dit_runtime.bundle.manifest import Manifest

LABELS = [3, 0, 4, 4, 1, 2, 3]


def latents(pipe, labels, **options):
    return pipe.sample(labels, **{"steps": 5, "guidance": 3.0, "output": "latents"} | options)


def failing(which: int):
    """Fail in one call of an engine, and in no other."""
    calls = []

    def look(inputs) -> None:
        calls.append(1)
        if len(calls) == which:
            raise RuntimeError("out of memory")

    return look


class WatchedEngine:
    """An engine with an eye on what goes in and a hand on what comes out."""

    def __init__(self, engine, look, change=lambda outputs: outputs) -> None:
        self.engine, self.look, self.change = engine, look, change

    def run(self, inputs):
        self.look(inputs)
        return self.change(self.engine.run(inputs))


def watch_denoiser(pipe: Pipeline, look, contract: Manifest | None = None) -> Pipeline:
    engines = pipe.engines.opened | {"denoiser": WatchedEngine(pipe.engines.opened["denoiser"], look)}
    return Pipeline(pipe.folder, contract or pipe.manifest, engines)


def with_stage(pipe: Pipeline, name: str, engines: dict | None = None, **changes) -> Pipeline:
    stages = (replace(stage, **changes) if stage.name == name else stage for stage in pipe.manifest.stages)
    contract = replace(pipe.manifest, stages=tuple(stages))
    return Pipeline(pipe.folder, contract, pipe.engines.opened | (engines or {}))
