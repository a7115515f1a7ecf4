"""All checks of a bundle: the proof that they can fail, each graph against PyTorch, and the replay of the reference."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dit_runtime.verify
from dit_export.checkpoints import Loaded
from dit_export.graph.trace import Decoder
from dit_export.precision.twin import twins
from dit_export.verify.parity import FINITE_LABELS, finite, graph_parity, proof
from dit_runtime.bundle import manifest
from dit_runtime.bundle.compiling import obstacle
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress


@dataclass(frozen=True)
class Built:
    folder: Path
    proof: list[Figure]
    checks: list[Figure]  # the gates; the proof is one of them unless the weights are a user's and fail it
    reference: Reference
    replay: Replay

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def sensitive(self) -> bool:
        return all(check.passed for check in self.proof)


def check(folder: Path, loaded: Loaded, decoder: Decoder | None, progress: Progress, **options: Any) -> Built:
    """All checks of a bundle: by its engines where they run here, and by the rounding twins of its typed graphs.

    Made-up weights must be sensitive; a user's may not be, and that is reported.
    """
    contract, reference = manifest.read(folder), load_reference(folder)
    with ExitStack() as opened:
        pipes: dict[str, Pipeline] = {}
        if not obstacle(contract):
            pipes[""] = opened.enter_context(Pipeline.load(folder, **options))
        if rounded := opened.enter_context(twins(folder, contract, always=not pipes)):
            pipes["twin: "] = rounded
        with progress.stage("verify: proof that the checks can fail"):
            proven = proof(next(iter(pipes.values())), reference)
        required = loaded.source["kind"] == "synthetic" or all(check.passed for check in proven)
        checks = list(proven) if required else []
        answered = []
        for name, pipe in pipes.items():
            with progress.stage(f"verify: {name}each graph against PyTorch"):
                found = [*graph_parity(pipe, loaded.network.module, decoder)]
            with progress.stage(f"verify: {name}replay of the reference"):
                tick = lambda done, total: progress.step(done, total, "replay")  # noqa: E731
                answered.append(replay(pipe, reference, tick))
            found += dit_runtime.verify.judge(contract, reference, answered[-1])
            if name:
                with progress.stage(f"verify: {name}{FINITE_LABELS} classes, every step finite"):
                    found.append(finite(pipe, reference))
            checks += [replace(entry, name=name + entry.name) for entry in found]
    return Built(folder, proven, checks, reference, answered[0])


def summary(built: Built) -> dict[str, Any]:
    return dit_runtime.verify.summary("sensitive" if built.sensitive else "insensitive", built.checks)


