"""`dit-export verify`: a bundle's figures against PyTorch, another bundle and a baseline, for people and for CI."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_export.verify import baseline, features
from dit_export.verify.features import OnnxJudge
from dit_export.verify.metrics import PROOF, figures_of, fingerprint_errors, fingerprinted_rows
from dit_runtime.backends import Options
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.errors import UsageError
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.verify import (
    REFERENCE,
    Figure,
    Reference,
    Replay,
    jsonable,
    load_reference,
    outcome,
    prompt_figures,
    replay,
    tolerances,
)

if TYPE_CHECKING:  # a gate that loads no weights needs no PyTorch
    from dit_export.checkpoints import Loaded
    from dit_export.verify import localize

COUNT = 2_000  # pictures before a judge, where one is named: half a point of agreement is ten of them
SPREAD = 16  # conditions that are asked beside the reference's, to localize a failure


@dataclass(frozen=True)
class Settings:
    bundle: Path
    size: str | None = None  # of a bundle with several; None: its first
    weights: bool = True  # load PyTorch's, and compare each graph at its batch sizes
    baseline: Path | None = None
    update: bool = False
    against: Path | None = None
    features: Path | None = None
    real: Path | None = None
    samples: Path | None = None
    count: int | None = None
    threads: int | None = None
    provider: str | None = None
    low_memory: bool = False


@dataclass(frozen=True, repr=False)
class Result:
    contract: Manifest
    reference: Reference
    replay: Replay
    checks: list[Figure]
    proof: list[Figure]  # empty where no weights were loaded
    sound: bool  # whether all tolerances hold; a baseline has limits of its own
    located: list[str]  # where the failure first shows, in words
    taps: list[tuple[str, float]]

    def __repr__(self) -> str:
        return f"<Result of {self.contract.title}: {outcome(self.checks)}>"

    @property
    def passed(self) -> bool:
        return all(figure.passed for figure in self.checks)

    @property
    def sensitive(self) -> bool:
        return all(figure.passed for figure in self.proof)

    @property
    def first(self) -> Figure | None:
        """The failure that comes first in the order of cause."""
        return next((figure for figure in self.checks if not figure.passed), None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "sensitive": self.sensitive,
            "first": None if self.first is None else self.first.to_dict(),
            "located": self.located,
            "taps": [{"name": name, "error": jsonable(error)} for name, error in self.taps],
            "checks": [figure.to_dict() for figure in self.checks],
        }


def gate(settings: Settings, progress: Progress) -> Result:
    contract, table = manifest.read(settings.bundle).at(settings.size), None
    tolerances(contract)  # before the long work
    with manifest.checking(settings.bundle, contract, [contract.own(REFERENCE)]):
        reference = load_reference(settings.bundle, contract)
    if settings.baseline is not None and not settings.update:
        table = baseline.read(settings.baseline)
        baseline.require_same(settings.baseline, table, contract, reference)
    loaded = _load(contract, settings.bundle, progress) if settings.weights else None
    options: dict[str, Any] = {
        "size": settings.size,
        "threads": settings.threads,
        "provider": settings.provider,
        "low_memory": settings.low_memory,
    }
    with ExitStack() as stack:
        other = None
        if settings.against is not None:
            other = stack.enter_context(Pipeline.load(settings.against, **options))
            _require_alike(contract, other, settings.bundle)
        if loaded is None:
            pipe = stack.enter_context(Pipeline.load(settings.bundle, **options))
            with progress.stage("verify: replay of the reference"):
                tick = lambda done, total: progress.step(done, total, "replay")  # noqa: E731
                answers = replay(pipe, reference, tick, thorough=True)
            checks, proven = [*prompt_figures(pipe), *figures_of(contract, reference, answers)], []
        else:
            from dit_export.networks.codec import make_decoder
            from dit_export.verify.check import compare, pipelines

            pipes = stack.enter_context(pipelines(settings.bundle, contract, **options))
            pipe = next(iter(pipes.values()))
            decoder = None if loaded.vae is None else make_decoder(loaded.vae)
            built = compare(pipes, reference, loaded, decoder, progress, thorough=True, text=loaded.text)
            answers, checks, proven = built.replay, built.checks, built.proof
        judged, asked = _distribution(settings, pipe, other, reference, (table or {}).get("measured", {}), progress)
        checks = checks + judged
        sound = all(figure.passed for figure in checks)
        if table is not None and settings.baseline is not None:
            checks = baseline.apply(settings.baseline, table, reference, checks)
        located, taps = _locate(settings, pipe, other, loaded, reference, answers, checks, progress)
    result = Result(contract, reference, answers, checks, proven, sound, located, taps)
    if settings.update and settings.baseline is not None and result.passed:  # what fails already is no baseline
        baseline.write(settings.baseline, contract, reference, checks, asked)
    return result


def _load(contract: Manifest, folder: Path, progress: Progress) -> Loaded:
    """Load PyTorch's network with the weights that the bundle was built from."""
    from dit_export.checkpoints import load_source

    with progress.stage("weights"):
        return load_source(contract, folder)


def _require_alike(contract: Manifest, other: Pipeline, folder: Path) -> None:
    """The other bundle is of the same network; its weights may be older."""
    for name in ("ports", "null", "guidance"):
        got, expected = getattr(other.manifest, name), getattr(contract, name)
        if got != expected:
            raise UsageError(f"--against {other.folder}: {name} is {got}, expected {expected} as in {folder}")


def _distribution(
    settings: Settings,
    pipe: Pipeline,
    other: Pipeline | None,
    reference: Reference,
    measured: Mapping[str, Any],
    progress: Progress,
) -> tuple[list[Figure], dict[str, Any]]:
    """Return a judge's figures of many pictures, where one is asked, and how it was asked, as a baseline stores it."""
    contract = pipe.manifest
    count = measured.get("count") if settings.count is None else settings.count
    if count is None and settings.features is None and settings.samples is None and settings.real is None:
        return [], {}
    count = COUNT if count is None else count
    judge: features.Judge | None = None
    real, name = None, "none"
    if settings.features is not None:
        judge, name = OnnxJudge(settings.features, settings.threads), manifest.sha256(settings.features)
    elif own := features.own_judge(settings.bundle, contract, settings.threads):
        judge, real, name = own
    if measured.get("judge", name) != name:
        raise UsageError(f"the baseline's judge is {measured['judge']}, this one {name}: pass its --features FILE.onnx")
    if settings.real is not None:
        real = features.read_real(settings.real, judge)
    if settings.samples is not None:
        ours, theirs = features.read_samples(settings.samples, judge), None
        features.require_width(ours.judged, real)
    elif judge is None:
        raise UsageError(f"{count} pictures need a network that looks at them: pass --features FILE.onnx")
    else:
        if count < features.FEWEST:
            raise UsageError(f"count {count}; expected at least {features.FEWEST} for a distance between distributions")
        if contract.end is None:
            raise UsageError("this bundle has no decoder, so it draws no pictures to judge: pass --samples FILE.npz")
        sizes = [int(size) for size in contract.end.gives[0].shape[2:]]
        if len(sizes) > 2:
            raise UsageError("this bundle draws videos, and a judge looks at images")
        blank = np.zeros((1, *sizes, 3), np.uint8)
        features.require_width(judge(blank), real)  # before the long work
        draw = features.plan_draw(contract, reference, count)
        with progress.stage(f"verify: {count} pictures before the judge"):
            tick = lambda done, total: progress.step(done, total, "pictures")  # noqa: E731
            ours, theirs = features.look(judge, pipe, draw, other, tick)
    asked = {"judge": name} | ({"count": count} if settings.samples is None else {})
    return features.figures(ours, theirs, real, contract.classes), asked


def _locate(
    settings: Settings,
    pipe: Pipeline,
    other: Pipeline | None,
    loaded: Loaded | None,
    reference: Reference,
    answers: Replay,
    checks: list[Figure],
    progress: Progress,
) -> tuple[list[str], list[tuple[str, float]]]:
    """Say where a failing stage first leaves the right way, where something right is at hand."""
    contract = pipe.manifest
    inside = {stage.name for stage in (*contract.before_loop, contract.step)}
    failed = [
        figure for figure in checks if not figure.passed and inside & {*figure.stage.removeprefix("twin: ").split("+")}
    ]
    if not failed or any(figure.stage == PROOF and not figure.passed for figure in checks):
        return [], []
    try:
        from dit_export.verify import localize  # here: it needs PyTorch
    except ImportError as error:
        return [f"not localized: {error}: pip install 'dit-export[export]'"], []
    try:
        truth: localize.PyTorch | Pipeline = other or localize.trace(
            loaded or _load(contract, settings.bundle, progress), progress
        )
    except (UsageError, OSError) as error:
        why = " ".join(str(error).split())
        return [f"not localized: {why}; pass --against BUNDLE, one that is right"], []
    step = next((figure.step for figure in failed if figure.stage == contract.step.name and figure.step), None)
    at = len(reference.timesteps) // 2 if step is None else step - 1
    options = Options(threads=settings.threads, provider=settings.provider)
    try:
        with progress.stage(f"verify: residual sums beside {'PyTorch' if other is None else other.folder}"):
            result = localize.locate(pipe, reference, truth, at, _asked(contract, reference, answers), options)
    except UsageError as error:
        return [f"not localized: {' '.join(str(error).split())}"], []
    return result.sentences, [(tap.name, tap.error) for tap in result.taps]


def _asked(contract: Manifest, reference: Reference, answers: Replay) -> localize.Asked:
    """The worst rows that have a fingerprint, the reference's own, and some that are spread over all."""
    from dit_export.verify.localize import Asked

    named, errors = fingerprinted_rows(contract, reference), fingerprint_errors(reference, answers)
    count = len(errors)
    worst = np.argsort(-errors, kind="stable")[: SPREAD // 2]
    spread = np.linspace(0, count - 1, min(count, SPREAD)).astype(int)
    which = np.array(list(dict.fromkeys([*worst.tolist(), *named.null.tolist(), *spread.tolist()])))
    return Asked({name: rows[which] for name, rows in named.rows.items()}, [named.names[row] for row in which])
