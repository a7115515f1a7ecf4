"""`dit-export tune`: search, print the front, and write the presets into the manifest."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dit_export.tune import chart, gate, plans
from dit_export.tune.gate import Limits, Score
from dit_export.tune.plans import INTERVAL
from dit_export.tune.search import Results, Search, Settings
from dit_export.tune.trial import NEAR, Trial
from dit_export.verify.features import FEWEST, OnnxJudge, own_judge, read_real
from dit_runtime import advice
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.bundle.records import MEASURED
from dit_runtime.console import answer
from dit_runtime.errors import UsageError
from dit_runtime.files import write_file
from dit_runtime.options import Parser, add_bundle, add_engine
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.verify import REFERENCE, Figure, load_reference

FEW, FINAL = 8, (1, NEAR)  # without a judge: pictures of a plan, at first and in the last round


def add_options(parser: Parser) -> None:
    usual = Settings()
    add_bundle(parser)
    add = parser.add_argument_group("search").add_argument
    text = (
        "limits of the preset NAME, or of all presets, against the bundle's default plan: rows, frechet (ratio), "
        'agreement (points lost), psnr (dB lost); such as "fast:rows=14,frechet=1.5"'
    )
    add("--budget", nargs="+", default=[], metavar="[NAME:]KEY=X", help=text)
    add("--trials", type=int, default=usual.trials, metavar="N", help=f"plans to try; default: {usual.trials}")
    text = f"pictures of a plan in the first round; default: {usual.pictures}, or {FEW} without a judge"
    add("--pictures", type=int, metavar="N", help=text)
    text = "seeds of the final round, and pictures for each; default: 5x2000, or 1x64 without a judge"
    add("--final", metavar="NxN", help=text)
    add = parser.add_argument_group("judge").add_argument
    text = "a network with an image input; needs --real; default: the bundle's own"
    add("--features", type=Path, metavar="FILE.onnx", help=text)
    add("--real", type=Path, metavar="FILE.npz", help="real pictures, their features, or mu and sigma")
    add_engine(parser, low_memory=False)
    add = parser.add_argument_group("output").add_argument
    text = "all scores; a later search continues from them; default: BUNDLE.tune.json"
    add("--results", type=Path, metavar="FILE.json", help=text)
    add(
        "--svg",
        type=Path,
        metavar="FILE.svg",
        help="a chart of the plans that no other beats; default: BUNDLE.tune.svg",
    )
    add("--presets", type=Path, metavar="FILE.json", help="write the presets to this file too, for a recipe")
    add("--dry-run", action="store_true", help="write no presets into the bundle")


def run(options: argparse.Namespace) -> int:
    """Exit code 1 where no plan keeps the limits of a preset."""
    folder, progress = options.bundle, Progress(quiet=options.quiet)
    contract = manifest.read(folder)
    contract.require_end()
    judge = _judge(options, contract)
    limits = gate.budgets(options.budget, judge is not None)
    settings = _settings(options, judge is not None)
    results_path = options.results or folder.with_name(f"{folder.resolve().name}.tune.json")
    svg_path = options.svg or results_path.with_suffix(".svg")
    for path in (results_path, svg_path, options.presets):  # before the long work
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: the folder {path.parent} does not exist")
    results = Results.open(results_path, fingerprint(contract, judge[2] if judge else ""))
    with manifest.checking(folder, contract, [REFERENCE]):
        reference = load_reference(folder, contract)
    with Pipeline.load(folder, threads=options.threads, provider=options.provider) as pipe:
        tick = lambda done, total: progress.step(done, total, "pictures")  # noqa: E731
        network, real = judge[:2] if judge else (None, None)
        trial = Trial(pipe, reference, network, real, tick)
        scores = Search(trial, results, limits, settings, progress).run()
        unrelated = trial.unrelated
    progress.end()
    base = scores[plans.key(plans.default(contract))]
    best = {name: gate.ranked(name, limit, scores, base, unrelated)[0] for name, limit in limits.items()}
    refused = {name: verdict for name, (_, verdict) in best.items() if not all(figure.passed for figure in verdict)}
    presets = {
        name: preset(json.loads(key), scores[key], base, limits[name], contract, settings)
        for name, (key, _) in best.items()
        if name not in refused
    }
    names: dict[str, list[str]] = {}
    for name in presets:
        names.setdefault(best[name][0], []).append(name)
    pictures = f"{settings.final[0]} × {settings.final[1]} pictures"
    judged = f"{pictures} before the judge" if judge else f"{pictures}, PSNR alone: the bundle has no judge"
    title = f"{contract.model.get('name')}: rows a picture against quality"
    write_file(svg_path, chart.svg(title, judged, scores, names))
    if options.presets:
        write_file(options.presets, json.dumps(presets, indent=1) + "\n")
    if not options.dry_run:
        now = manifest.read(folder)
        if fingerprint(now, judge[2] if judge else "") != results.bundle:
            raise UsageError(f"{folder}: its files changed while it was tuned; tune it again")
        manifest.write(folder, replace(now, presets={**now.presets, **presets}))
    commands = []
    for name, _verdict in refused.items():
        if words := gate.reachable(name, limits[name], scores, base, unrelated):
            commands.append(_again(options, words))
    answers = {"presets": presets, "plans": _rows(scores, names), "refused": [*refused], "next": commands}
    lines = [judged, table(scores, names)]
    lines.append(f"results {results_path}, chart {svg_path}" + ("" if options.dry_run else f", presets in {folder}"))
    failures = [f"FAILED {name}: no plan keeps its limits; the nearest: {failed(best[name][1])}" for name in refused]
    failures += advice.lines(commands)
    answer(options, answers, "\n".join([*lines, *failures]), "\n".join(failures))
    return int(bool(refused))


def _again(options: argparse.Namespace, budget: str) -> str:
    """Return the search with one more budget, which goes on from the scores of this one."""
    words = ["dit-export", "tune", str(options.bundle), "--budget", *options.budget, budget]
    for name in ("trials", "pictures", "final", "features", "real", "threads", "provider", "results", "svg", "presets"):
        value = getattr(options, name)
        if value is not None and value != getattr(Settings(), name, None):
            words += [f"--{name}", str(value)]
    return shlex.join([*words, *(["--dry-run"] if options.dry_run else [])])


def _judge(options: argparse.Namespace, contract: Manifest) -> tuple[OnnxJudge, Any, str] | None:
    """Return the network that judges, what real pictures are to it, and a sum of both."""
    if options.features is None and options.real is None:
        own = own_judge(options.bundle, contract, options.threads)
        return own if own is not None and own[1] is not None else None
    if options.features is None or options.real is None:
        raise UsageError("a judge of your own needs both --features FILE.onnx and --real FILE.npz")
    judge = OnnxJudge(options.features, options.threads)
    sums = manifest.sha256(options.features) + manifest.sha256(options.real)
    return judge, read_real(options.real, judge), sums


def _settings(options: argparse.Namespace, judged: bool) -> Settings:
    usual = Settings() if judged else Settings(pictures=FEW, final=FINAL)
    final, fewest = usual.final, FEWEST if judged else 1
    if options.final:
        words = options.final.split("x")
        if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):
            raise UsageError(f"final {options.final!r}; expected seeds x pictures, such as 5x2000")
        final = int(words[0]), int(words[1])
    pictures = usual.pictures if options.pictures is None else options.pictures
    if options.trials < 1 or min(pictures, final[1]) < fewest:
        raise UsageError(f"trials {options.trials}, pictures {pictures} and {final[1]}; expected 1, {fewest} or more")
    return replace(usual, trials=options.trials, pictures=pictures, final=final)


def fingerprint(contract: Manifest, judge: str) -> str:
    """Return a sum over all that decides which scores a plan gets."""
    files = "".join(f"{name} {file.sha256}\n" for name, file in sorted(contract.files.items()))
    where = "".join(f"{stage.name} {stage.backend} {stage.precision}\n" for stage in contract.stages)
    return hashlib.sha256((files + where + judge).encode()).hexdigest()


def preset(
    plan: Mapping[str, Any], score: Score, base: Score, limits: Limits, contract: Manifest, settings: Settings
) -> dict[str, Any]:
    """Return a plan with the figures for which it was accepted."""
    step = contract.step
    measured = {
        **_figures(score),
        "pictures": settings.final[0] * settings.final[1],
        "limits": {name: limit for name, limit in limits._asdict().items() if limit is not None},
        "default": {**plans.default(contract), **_figures(base)},
        "engine": f"{step.precision} on {step.backend}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    return {**plan, MEASURED: measured}


def _figures(score: Score) -> dict[str, float]:
    return {name: round(value, 4) for name, value in score._asdict().items() if value is not None}


def _rows(scores: Mapping[str, Score], names: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    best = gate.front(scores)
    order = sorted(scores, key=lambda key: (scores[key].rows, scores[key].quality))
    return [
        {**json.loads(key), **_figures(scores[key]), "front": key in best, "presets": names.get(key, [])}
        for key in order
    ]


def table(scores: Mapping[str, Score], names: Mapping[str, list[str]]) -> str:
    """Return the plans by rows; a star marks those of the front."""
    lines = [f"{'':<2}{'rows':>5} {'Fréchet':>8} {'agreement':>9} {'PSNR':>6}  plan"]
    for row in _rows(scores, names):
        frechet = f"{row['frechet']:.3f}" if "frechet" in row else "–"
        agreement = f"{row['agreement']:.2%}" if "agreement" in row else "–"
        mark, shown = "*" if row["front"] else "", f" [{', '.join(row['presets'])}]" if row["presets"] else ""
        lines.append(
            f"{mark:<2}{row['rows']:>5.4g} {frechet:>8} {agreement:>9} {row['psnr']:>6.2f}  {_shown(row)}{shown}"
        )
    return "\n".join(lines)


def _shown(plan: Mapping[str, Any]) -> str:
    words = [f"{plan['steps']} steps of {plan['solver']}"]
    others = plan.keys() - {"steps", "solver", "front", "presets", *Score._fields, INTERVAL}
    if INTERVAL in plan:
        low, high = plan[INTERVAL]
        words.append(f"guided in [{low:g}, {high:g}]")
    return ", ".join(words + [f"{name} {plan[name]}" for name in sorted(others)])


def failed(verdict: list[Figure]) -> str:
    """Return the figures that fail, with their limits."""
    broken = [figure for figure in verdict if not figure.passed]
    return "; ".join(
        f"{figure.metric} {figure.value:.4g}, expected at {'least' if figure.at_least else 'most'} {figure.limit:.4g}"
        for figure in broken
        if figure.limit is not None
    )
