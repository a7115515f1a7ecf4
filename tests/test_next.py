"""The commands that a failed gate names: each fits its failure, and is a command."""

from __future__ import annotations

import shlex
from argparse import Namespace
from dataclasses import replace

import pytest

import dit_export.cli
import dit_runtime.cli
from dit_export.cli.recipe import read_recipe
from dit_export.recipe import Recipe, wider
from dit_export.tune import gate as tuning
from dit_export.tune.gate import Limits, Score
from dit_export.verify import advice as verifying
from dit_export.verify.gate import Result
from dit_runtime import advice
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.verify import Figure

PARSERS = {"dit-export": dit_export.cli.parser, "dit-run": dit_runtime.cli.parser}
BAD = Figure("denoiser", "prediction, rel-L2", 0.5, 0.1)


def parse(command: str) -> Namespace:
    program, *words = shlex.split(command)
    return PARSERS[program]().parse_args(words)


@pytest.fixture
def contract(handmade) -> Manifest:
    return manifest.read(handmade("labels"))


def with_step(contract: Manifest, **changes: object) -> Manifest:
    stages = [replace(stage, **changes) if stage == contract.step else stage for stage in contract.stages]
    return replace(contract, stages=tuple(stages))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(model="S/8", synthetic=0, resolution=128, output="a bundle"),
        Recipe(
            checkpoint="x.pt", heads=4, resolution=[512, "512x768"], latents_only=True, precision="fp16", max_batch=2
        ),
        Recipe(pipeline="p", precision="int8", keep_float=["fc2", "decoder up"], conditions="c.npz", strict=True),
        Recipe(checkpoint="x", backend="tensorrt", compute_capability=("8.6", "8.9"), pool_limit=("workspace:4G",)),
    ],
)
def test_a_recipe_is_a_command(recipe: Recipe) -> None:
    assert read_recipe(parse(recipe.command())) == recipe
    for change in wider("onnxruntime", recipe.precision):
        again = read_recipe(parse(recipe.command(**change)))
        assert again == replace(recipe, **change) and again.precision != recipe.precision
        assert again.precision not in ("int8", "fp8") and not again.conditions and not again.strict


def gate(contract: Manifest, *figures: Figure, sound: bool = False, options: str = "verify BUNDLE") -> list[str]:
    result = Result(contract, None, None, list(figures), [], sound, [], [])
    return verifying.after_gate(parse(f"dit-export {options}"), result)


def test_what_the_gate_names(contract: Manifest) -> None:
    source = {"recipe": vars(Recipe(checkpoint="x.pt", precision="int8", output="b", conditions="c.npz"))}
    int8 = replace(with_step(contract, precision="int8"), source=source)
    show = "dit-export verify BUNDLE --report report.html"
    assert gate(int8, replace(BAD, value=0.0)) == []
    first, *others = gate(int8, BAD)
    assert first == show and len(others) == 3
    assert {read_recipe(parse(other)).precision for other in others} == {"fp32", "fp16", "bf16"}
    for figure in (replace(BAD, stage="sampler"), replace(BAD, stage="proof")):  # no precision mends these
        assert gate(int8, figure) == [show]
    assert gate(contract, BAD) == [show]  # fp32 is the widest
    assert gate(replace(int8, source={"recipe": vars(Recipe(precision="int8"))}), BAD) == [show]  # a caller's network
    assert gate(int8, BAD, options="regress BUNDLE --report r.html --threads 2")[0].startswith("dit-export build ")

    options = "regress BUNDLE --baseline b.json"
    assert gate(int8, BAD, sound=True, options=options) == [
        "dit-export regress BUNDLE --baseline b.json --report report.html",
        "dit-export regress BUNDLE --baseline b.json --update-baseline",
    ]
    assert not any("--update-baseline" in command for command in gate(int8, BAD, options=options))


def test_a_decoder_in_int8(contract: Manifest) -> None:
    source = {"recipe": vars(Recipe(checkpoint="x.pt", precision="int8"))}
    stages = tuple(replace(stage, precision="int8") for stage in contract.stages)
    int8 = replace(contract, stages=stages, source=source)
    assert int8.end is not None
    figure = replace(BAD, stage=int8.end.name)
    assert read_recipe(parse(gate(int8, figure)[1])).keep_float == ["decoder"]
    assert read_recipe(parse(gate(int8, figure, BAD)[1])).keep_float is None


def test_what_engines_name(contract: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(contract: Manifest, *figures: Figure, options: str = "verify 'a bundle'") -> list[str]:
        commands = advice.after_verify(parse(f"dit-run {options}"), contract, figures)
        assert all(parse(command) for command in commands)
        return commands

    show = "dit-export regress 'a bundle' --report report.html"
    assert named(contract, BAD) == [show]
    on_gpu = "verify 'a bundle' --provider cuda"
    show_on_gpu = "dit-export regress 'a bundle' --provider cuda --report report.html"
    assert named(contract, BAD, options=on_gpu) == ["dit-run verify 'a bundle' --provider cpu", show_on_gpu]
    assert named(contract, replace(BAD, stage="sampler"), options=on_gpu) == [show_on_gpu]  # no engine computes it
    assert named(with_step(contract, backend="openvino"), BAD, options=on_gpu) == [show_on_gpu]
    monkeypatch.setattr(manifest, "built", lambda _, stage: {"versions": 1} if stage.name == "denoiser" else {})
    rtx = with_step(contract, backend="tensorrt-rtx")
    assert named(rtx, BAD) == ["dit-run compile 'a bundle' --backend tensorrt-rtx", show]
    (command,) = advice.after_compile(
        parse("dit-run compile b --backend openvino"), with_step(contract, backend="openvino")
    )
    assert command == "dit-run compile b --backend onnxruntime"


def test_the_budget_that_a_plan_keeps() -> None:
    base = Score(rows=50, psnr=30.0, frechet=2.0, agreement=0.99)
    scores = {"a": base, "b": Score(20, 28.0, 2.5, 0.98), "c": Score(10, 27.0, 9.0, 0.5)}
    for limits in (Limits(rows=5.0), Limits(rows=12.0, frechet=1.0, agreement=0.1)):
        _, verdict = tuning.ranked("fast", limits, scores, base, 20.0)[0]
        assert not all(figure.passed for figure in verdict)
        words = tuning.reachable("fast", limits, scores, base, 20.0)
        wider_limits = tuning.budgets([words], True)["fast"]
        limits = limits._replace(**{key: value for key, value in wider_limits._asdict().items() if f"{key}=" in words})
        assert all(figure.passed for figure in tuning.ranked("fast", limits, scores, base, 20.0)[0][1]), words
    assert tuning.reachable("fast", Limits(rows=5.0), {"a": base}, base, 31.0) == ""  # nearer to other pictures
