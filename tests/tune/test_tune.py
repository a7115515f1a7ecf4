"""The search and its command, on a hand-made bundle: what is drawn, kept, gone on with, and written."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from dit_export.bundle.presets import read_presets
from dit_export.cli import main
from dit_export.tune import plans
from dit_export.tune.gate import UNJUDGED, Score
from dit_export.tune.plans import Plan
from dit_export.tune.search import Results, Search, Settings
from dit_export.tune.trial import Block, Trial
from dit_export.verify.distribution import fit
from dit_export.verify.features import OnnxJudge
from dit_runtime import Pipeline, Request
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from dit_runtime.progress import Progress
from dit_runtime.sampling.process import NOISE_SOLVERS, Process
from dit_runtime.verify import load_reference
from tests.verify.test_features import network

FEW = Settings(trials=24, pictures=4, finalists=3, final=(2, 10))
QUICK = ["--trials", "12", "--pictures", "2", "--final", "1x4", "--threads", "1"]


@pytest.fixture
def bundle(handmade: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(handmade("labels"), tmp_path / "bundle"))


class Counting(Trial):
    """Counts what is drawn."""

    drawn: list[tuple[str, Block]]

    def __call__(self, plan: Plan, block: Block) -> Score:
        self.drawn.append((plans.key(plan), block))
        return super().__call__(plan, block)


@pytest.fixture
def trial(bundle: Path):
    with Pipeline.load(bundle, threads=1) as pipe:
        made = Counting(pipe, load_reference(bundle, pipe.manifest), None, None, lambda done, total: None)
        made.drawn = []
        yield made


def search(trial: Trial, path: Path, settings: Settings = FEW) -> dict[str, Score]:
    return Search(trial, Results.open(path, "bundle"), UNJUDGED, settings, Progress()).run()


def test_few_plans_are_drawn_often(trial: Counting, tmp_path: Path) -> None:
    scores = search(trial, tmp_path / "x.json")
    sizes = [block.size for _, block in trial.drawn]
    assert [sizes.count(size) for size in (4, 10)] == [24, 2 * len(scores)]
    assert 6 <= sizes.count(16) <= 7  # a fourth, and the bundle's own plan
    assert len(scores) <= FEW.finalists + 1 and plans.key(plans.default(trial.pipe.manifest)) in scores
    assert len({*trial.drawn}) == len(trial.drawn)
    assert all(block.first >= 1_000_000 for _, block in trial.drawn if block.size == 10)  # pictures that chose no plan


def test_a_search_that_was_stopped_goes_on(trial: Counting, tmp_path: Path) -> None:
    whole = search(trial, tmp_path / "whole.json")
    expected = trial.drawn
    trial.drawn = []

    class Stop(Exception):
        pass

    def stop(plan: Mapping, block: Block) -> Score:
        if len(trial.drawn) == 10:
            raise Stop
        return trial(plan, block)

    stopping = Search(trial, Results.open(tmp_path / "parts.json", "bundle"), UNJUDGED, FEW, Progress())
    stopping.results.score = lambda _, plan, block: Results.score(stopping.results, stop, plan, block)
    with pytest.raises(Stop):
        stopping.run()
    assert search(trial, tmp_path / "parts.json") == whole
    assert trial.drawn == expected  # none twice, none left out


def test_results_of_another_bundle_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, said in (
        ('{"format": 1, "bundle": "other", "scores": {}}', "another bundle"),
        ("[]", "no results"),
        ("{", "no results"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=said):
            Results.open(path, "bundle")


def test_a_score_is_of_the_plans_own_pictures(trial: Counting) -> None:
    base = plans.default(trial.pipe.manifest)
    long = {**base, "steps": 100}
    same, other = (trial(plan, Block(5, 4)) for plan in (long, base))
    assert (same.psnr, same.rows) == (100.0, 200.0)
    assert other.psnr < 100 and other.rows == 50
    drawn = trial.pipe.sample([0, 1, 2, 3], seed=[5, 6, 7, 8], steps=100)  # labels in turn: seed 5 has label 5 mod 5
    assert np.array_equal(trial.long(Block(5, 4)), drawn)
    assert 0 < trial.unrelated < 60


def test_a_judge_looks_at_all_pictures(bundle: Path, tmp_path: Path) -> None:
    judge = OnnxJudge(network(tmp_path / "judge.onnx", ("features",)), 1)
    with Pipeline.load(bundle, threads=1) as pipe:
        reference = load_reference(bundle, pipe.manifest)
        base = plans.default(pipe.manifest)
        pictures = pipe.sample(np.arange(60) % 5, seed=[*range(60)])
        trial = Trial(pipe, reference, judge, fit(judge(pictures).features), lambda done, total: None)
        assert trial(base, Block(0, 60)).frechet == pytest.approx(0, abs=1e-6)
        assert trial({**base, "steps": 4}, Block(0, 60)).frechet > 1e-3
        assert trial(base, Block(0, 60)).agreement is None  # it names no classes


def test_plans_are_of_the_facts(trial: Counting) -> None:
    contract = trial.pipe.manifest
    around = plans.neighbours(plans.default(contract), contract, [900.0, 600.0, 300.0, 150.0, 30.0])
    assert {plan["spacing"] for plan in around["times"]} >= {"900, 600, 300, 30", "900, 600, 400, 150, 30"}
    assert {"ddim"} | {plan["solver"] for plan in around["solver"]} == {*NOISE_SOLVERS}
    for change, others in around.items():
        for plan in others:
            assert plan != plans.default(contract), change
    assert trial.fit({"solver": "ddim", "steps": 1001}) is None
    assert trial.fit({"solver": "dpm++", "steps": 5, "spacing": "linspace"}) == {"solver": "dpm++", "steps": 5}
    assert trial.rows({"solver": "ddim", "steps": 5}) == 10


def test_the_command_writes_presets(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = manifest.read(bundle)
    results = bundle.with_name("bundle.tune.json")
    assert main(["tune", str(bundle), *QUICK, "--dry-run"]) == 0
    assert manifest.read(bundle) == before
    assert "PSNR alone: the bundle has no judge" in capsys.readouterr().out
    drawn = results.read_text()
    presets = bundle.with_name("presets.json")
    assert main(["tune", str(bundle), *QUICK, "--presets", str(presets), "--json"]) == 0
    assert results.read_text() == drawn  # nothing was drawn again
    after, printed = manifest.read(bundle), json.loads(capsys.readouterr().out)
    assert after.files == before.files and after.presets.keys() == {"quick", "lean", "quality", "balanced", "fast"}
    assert json.loads(presets.read_text()) == printed["presets"]
    fast = after.presets["fast"]
    assert fast["measured"]["default"]["rows"] == 50 and fast["measured"]["pictures"] == 4
    assert fast["measured"]["rows"] <= 50 and fast["measured"]["limits"] == {"psnr": 6.0}
    with Pipeline.load(bundle, threads=1) as pipe:
        run = pipe.run(Request("ant", preset="fast"))
        run.result()
        assert run.rows == fast["measured"]["rows"]
    chart = ElementTree.parse(bundle.with_name("bundle.tune.svg"))
    words = " ".join("".join(element.itertext()) for element in chart.iter())
    assert "quality" in words and "rows a picture" in words and "PSNR" in words


def test_a_budget_that_no_plan_keeps(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(bundle), *QUICK, "--budget", "fast:rows=1"]) == 1
    said = capsys.readouterr().out
    assert "FAILED fast: no plan keeps its limits; the nearest: " in said
    assert "rows a picture" in said and "expected at most 1" in said
    (command,) = re.findall("^next: dit-export (.*)$", said, re.MULTILINE)
    assert manifest.read(bundle).presets.keys() == {"quick", "lean", "quality", "balanced"}
    assert main(shlex.split(command)) == 0  # the budget that it names is one that a plan keeps
    assert manifest.read(bundle).presets["fast"]["measured"]["limits"]["rows"] > 1


def test_presets_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "presets.json"
    with pytest.raises(UsageError, match=r"presets.json: no such file; make it with `dit-export tune BUNDLE --presets"):
        read_presets(path, Process())
    for text, said in (
        ("{", "presets.json: "),
        ("[]", "got list, expected a table of presets by name"),
        ('{"fast": {"steps": 0}}', "preset fast: steps: got 0, expected 1 to 1000"),
        ('{"fast": {"solver": "euler"}}', "preset fast: solver: got euler, expected one of ddpm"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=said):
            read_presets(path, Process())
    path.write_text('{"fast": {"steps": 9, "guidance_interval": [0.2, 0.7]}}')
    assert read_presets(path, Process())["fast"]["steps"] == 9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--final", "5"], "expected seeds x pictures"),
        (["--budget", "frechet=2"], "needs a judge"),
        (["--features", "x.onnx"], "needs both --features FILE.onnx and --real FILE.npz"),
        (["--trials", "0"], "trials 0"),
        (["--results", "nowhere/x.json"], "does not exist"),
    ],
)
def test_a_mistake_is_one_line(bundle: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    assert main(["tune", str(bundle), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
