"""The full check of a bundle against PyTorch: each graph at its batch sizes, the reference's replay, and the proof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dit_runtime.verify
from dit_export.checkpoints import Loaded
from dit_export.networks.codec import Decoder
from dit_export.networks.encoding import make_encoder
from dit_export.networks.text import PromptEncoder
from dit_export.precision.twin import twins
from dit_export.verify.metrics import by_cause, figures_of
from dit_export.verify.parity import FINITE_RUNS, condition_share, encoder_parity, finite, graph_parity, proof, reacts
from dit_export.verify.text import prompt_parity
from dit_runtime.bundle import manifest
from dit_runtime.bundle.compiling import why_unavailable
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.verify import Figure, Reference, Replay, load_reference, outcome, replay


@dataclass(frozen=True, repr=False)
class Built:
    folder: Path
    proof: list[Figure]
    checks: list[Figure]  # the gates; the proof is one of them unless the weights are a user's and fail it
    reference: Reference
    replay: Replay
    advice: str = ""  # what to do where a gate failed
    changes: Sequence[Mapping[str, Any]] = ()  # of the recipe, that are worth a try then

    def __repr__(self) -> str:
        return f"<Built {self.folder}: {outcome(self.checks)}>"

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def sensitive(self) -> bool:
        return all(check.passed for check in self.proof)


def check(folder: Path, loaded: Loaded, decoder: Decoder | None, progress: Progress, **options: Any) -> Built:
    """Check a bundle by its engines where they run here, and by the rounding twins of its half-precision graphs."""
    contract = manifest.read(folder)
    reference = load_reference(folder, contract)
    with pipelines(folder, contract, **options) as pipes:
        return compare(pipes, reference, loaded, decoder, progress, text=loaded.text)


@contextmanager
def pipelines(folder: Path, contract: Manifest, **options: Any) -> Iterator[dict[str, Pipeline]]:
    """Open the bundle, under "", and its rounding twins, under "twin: "; at least one of them is there."""
    with ExitStack() as opened:
        pipes: dict[str, Pipeline] = {}
        if not why_unavailable(contract, options.get("provider")):
            pipes[""] = opened.enter_context(Pipeline.load(folder, **options))
        if rounded := opened.enter_context(twins(folder, contract, always=not pipes)):
            pipes["twin: "] = rounded
        yield pipes


def compare(
    pipes: Mapping[str, Pipeline],
    reference: Reference,
    loaded: Loaded,
    decoder: Decoder | None,
    progress: Progress,
    thorough: bool = False,
    text: PromptEncoder | None = None,
) -> Built:
    """Compare what is open with PyTorch's network and with its reference run.

    Random weights must be sensitive; a user's may not be, and that is reported. What a condition changes is a gate
    wherever PyTorch's network itself reacts to it.
    """
    first = next(iter(pipes.values()))
    contract, network = first.manifest, loaded.network
    with progress.stage("verify: proof that the checks can fail"):
        proven = proof(first, reference)
    synthetic = loaded.source.get("kind") == "synthetic"
    checks = list(proven) if synthetic or all(figure.passed for figure in proven) else []
    shares = synthetic or reacts(reference)  # an int8 engine's own rounding may pass the proof
    answers = []
    for name, pipe in pipes.items():
        with progress.stage(f"verify: {name}each graph against PyTorch"):
            figures = list(graph_parity(pipe, network, decoder))
            figures += prompt_parity(pipe, text) if text is not None else []
            if decoder is not None and contract.start is not None:
                figures += encoder_parity(pipe, make_encoder(loaded.vae))
            figures += condition_share(pipe, reference) if shares else []
        with progress.stage(f"verify: {name}replay of the reference"):
            tick = lambda done, total: progress.step(done, total, "replay")  # noqa: E731
            answers.append(replay(pipe, reference, tick, thorough=thorough))
        judge = figures_of if thorough else dit_runtime.verify.judge
        figures = by_cause(contract, [*judge(contract, reference, answers[-1]), *figures])
        if name:
            with progress.stage(f"verify: {name}{FINITE_RUNS} runs, every step finite"):
                figures.append(finite(pipe, network, reference))
        checks += [replace(figure, stage=name + figure.stage) for figure in figures]
    return Built(first.folder, proven, checks, reference, answers[0])


def summary(built: Built) -> dict[str, Any]:
    """Return what the manifest says of the checks."""
    return dit_runtime.verify.summary("sensitive" if built.sensitive else "insensitive", built.checks)
