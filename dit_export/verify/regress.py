"""`dit-export regress`: a bundle's figures against PyTorch's answer, within the limits of a baseline, for CI."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_export.verify import baseline, features
from dit_export.verify.features import OnnxJudge
from dit_export.verify.metrics import Metric, of_replay, wrong_labels
from dit_runtime.backends import Options
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.errors import UsageError
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.replay import REFERENCE, Reference, Replay, load_reference, replay
from dit_runtime.verify import jsonable, tolerances

COUNT = 2_000  # pictures before a judge, where one is named: half a point of agreement is ten of them


@dataclass(frozen=True)
class Settings:
    bundle: Path
    baseline: Path | None = None
    update: bool = False
    against: Path | None = None
    features: Path | None = None
    real: Path | None = None
    samples: Path | None = None
    count: int | None = None
    threads: int | None = None
    provider: str | None = None


@dataclass(frozen=True)
class Result:
    contract: Manifest
    reference: Reference
    found: Replay
    metrics: list[Metric]
    located: list[str]  # where the failure first shows, in words
    taps: list[tuple[str, float]]

    @property
    def passed(self) -> bool:
        return all(metric.passed for metric in self.metrics)

    @property
    def first(self) -> Metric | None:
        """The failure that comes first in the order of cause."""
        return next((metric for metric in self.metrics if not metric.passed), None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "first": None if self.first is None else self.first.to_dict(),
            "located": self.located,
            "taps": [{"name": name, "error": jsonable(error)} for name, error in self.taps],
            "metrics": [metric.to_dict() for metric in self.metrics],
        }


def regress(settings: Settings, progress: Progress) -> Result:
    with ExitStack() as stack:
        pipe = stack.enter_context(_open(settings.bundle, settings))
        contract, table = pipe.manifest, None
        manifest.check_files(pipe.folder, contract, [REFERENCE])
        reference = load_reference(pipe.folder)
        tolerances(contract)  # before the long work
        if settings.baseline is not None and not settings.update:
            table = baseline.read(settings.baseline)
            baseline.require_same(settings.baseline, table, contract, reference)
        other = None
        if settings.against is not None:
            other = stack.enter_context(_open(settings.against, settings))
            _require_alike(pipe, other)
        with progress.stage("regress: replay of the reference"):
            found = replay(pipe, reference, lambda done, all_: progress.step(done, all_, "replay"), thorough=True)
        metrics = of_replay(contract, reference, found)
        judged, asked = _distribution(settings, pipe, other, (table or {}).get("measured", {}), progress)
        metrics += judged
        if table is not None and settings.baseline is not None:
            metrics = baseline.apply(settings.baseline, table, reference, metrics)
        located, taps = _locate(settings, pipe, other, reference, found, metrics, progress)
    result = Result(contract, reference, found, metrics, located, taps)
    if settings.update and settings.baseline is not None and result.passed:  # what fails already is no baseline
        baseline.write(settings.baseline, contract, reference, metrics, asked)
    return result


def _open(folder: Path, settings: Settings) -> Pipeline:
    return Pipeline.load(folder, threads=settings.threads, provider=settings.provider)


def _require_alike(pipe: Pipeline, other: Pipeline) -> None:
    """The other bundle is of the same network; its weights may be older."""
    for name in ("latent_shape", "num_classes", "guided_channels", "unguided_up_to_one"):
        got, expected = getattr(other.manifest, name), getattr(pipe.manifest, name)
        if got != expected:
            raise UsageError(f"--against {other.folder}: {name} is {got}, expected {expected} as in {pipe.folder}")


def _distribution(
    settings: Settings, pipe: Pipeline, other: Pipeline | None, measured: Mapping[str, Any], progress: Progress
) -> tuple[list[Metric], dict[str, Any]]:
    """What a judge says of many pictures, where one is asked, and how it was asked, as a baseline keeps it."""
    count = measured.get("count") if settings.count is None else settings.count
    if count is None and settings.features is None and settings.samples is None and settings.real is None:
        return [], {}
    count = COUNT if count is None else count
    judge: features.Judge | None = None
    real, name = None, "none"
    if settings.features is not None:
        judge, name = OnnxJudge(settings.features, settings.threads), manifest.sha256(settings.features)
    elif features.is_demo(pipe.manifest):
        (judge, real), name = features.demo_judge(), "the demo's"
    if measured.get("judge", name) != name:
        raise UsageError(f"the baseline's judge is {measured['judge']}, this one {name}: pass its --features FILE.onnx")
    if settings.real is not None:
        real = features.read_real(settings.real, judge)
    if settings.samples is not None:
        seen, theirs = features.read_samples(settings.samples, judge), None
        features.require_width(seen.judged, real)
    elif judge is None:
        raise UsageError(f"{count} pictures need a network that looks at them: pass --features FILE.onnx")
    else:
        if count < features.FEWEST:
            raise UsageError(f"count {count}; expected at least {features.FEWEST} for a distance between distributions")
        height, width = (8 * side for side in pipe.manifest.latent_shape[1:])
        features.require_width(judge(np.zeros((1, height, width, 3), np.uint8)), real)  # before the long work
        with progress.stage(f"regress: {count} pictures before the judge"):

            def step(done: int, total: int) -> None:
                progress.step(done, total, "pictures")

            seen, theirs = features.look(judge, pipe, count, other, step)
    asked = {"judge": name} | ({"count": count} if settings.samples is None else {})
    return features.metrics(seen, theirs, real, pipe.manifest.num_classes), asked


def _locate(
    settings: Settings,
    pipe: Pipeline,
    other: Pipeline | None,
    reference: Reference,
    found: Replay,
    metrics: list[Metric],
    progress: Progress,
) -> tuple[list[str], list[tuple[str, float]]]:
    """Where a failing conditioner or denoiser first leaves the right way, where something right is at hand."""
    failed = [metric for metric in metrics if not metric.passed]
    if not any(metric.graph in ("conditioner", "denoiser") for metric in failed):
        return [], []
    try:
        from dit_export.verify import localize  # here: it needs PyTorch, which a gate that passes does not
    except ImportError as error:
        return [f"not localized: {error}: pip install 'dit-export[export]'"], []
    try:
        truth: localize.Truth | Pipeline = other or localize.OfPyTorch(_model(pipe, progress))
    except (UsageError, OSError) as error:
        why = " ".join(str(error).split())
        return [f"not localized: {why}; pass --against BUNDLE, one that is right"], []
    step = next((metric.step for metric in failed if metric.graph == "denoiser" and metric.step), None)
    at = len(reference.timesteps) // 2 if step is None else step - 1
    limit = tolerances(pipe.manifest)["conditioner"].conditioner
    wrong = [int(label) for label in wrong_labels(reference, found, limit)]
    options = Options(threads=settings.threads, provider=settings.provider)
    try:
        with progress.stage(f"regress: blocks beside {'PyTorch' if other is None else other.folder}"):
            result = localize.locate(pipe, reference, truth, at, wrong, options)
    except UsageError as error:
        return [f"not localized: {' '.join(str(error).split())}"], []
    return result.sentences, [(tap.name, tap.error) for tap in result.taps]


def _model(pipe: Pipeline, progress: Progress) -> Any:
    """PyTorch's network with the weights that the bundle was built from."""
    from dit_export.checkpoints import load_source

    with progress.stage("regress: weights"):
        return load_source(pipe.manifest, pipe.folder).model
