"""Presets of a bundle: the request's own fields win, the manifest's are checked, and people see both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dit_runtime import Request, UsageError
from dit_runtime.bundle import manifest
from dit_runtime.bundle.summary import summary
from dit_runtime.cli import main
from dit_runtime.facts import PRESET_FIELDS
from tests.handmade import module
from tests.runtime.test_manifest import SCHEMA

QUICK: dict[str, Any] = module("make_bundle").PRESET


def latents(pipe: Any, **fields: Any) -> np.ndarray:
    return pipe.sample(["ant", "dog"], seed=3, output="latents", **fields)


def test_a_preset_is_its_fields(opened) -> None:
    pipe = opened()
    lean = module("make_bundle").LEAN
    assert np.array_equal(latents(pipe, preset="lean"), latents(pipe, **lean))
    assert not np.array_equal(latents(pipe, preset="lean", max_order=1), latents(pipe, **lean))
    assert np.array_equal(latents(pipe, preset="quick"), latents(pipe, **QUICK))
    assert not np.array_equal(latents(pipe, preset="quick"), latents(pipe))
    run = pipe.run(Request("ant", preset="quick"))
    assert run.steps == QUICK["steps"]


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 4), ("guidance", [1.5, 3.0]), ("solver", "dpm++1"), ("eta", 0.0)]
)
def test_a_field_of_the_request_wins(opened, name, value) -> None:
    pipe, fields = opened(), QUICK | {name: value}
    assert np.array_equal(latents(pipe, preset="quick", **{name: value}), latents(pipe, **fields))


@pytest.mark.parametrize(
    ("stated", "left"),
    [
        ({"steps": 4}, {"steps": 4}),
        ({"spacing": "900, 500, 100"}, {"spacing": "900, 500, 100"}),
        ({"cache": "easycache"}, {"spacing": "900, 400", "steps": 2, "cache": "easycache"}),
    ],
)
def test_what_belongs_together_goes_together(opened, stated, left) -> None:
    preset = {"spacing": "900, 400", "steps": 2, "cache": "taylorseer", "cache_interval": 2}
    contract = replace(opened().manifest, presets={"listed": preset})
    request = Request("ant", preset="listed", **stated).with_preset(contract)
    assert {name: getattr(request, name) for name in left} == left
    request.check(contract)


def test_an_unknown_preset_is_one_line(opened, handmade, capsys, tmp_path) -> None:
    with pytest.raises(
        UsageError, match=r"preset 'quack' is not known \(did you mean \"quick\"\?\); known: quick, lean"
    ):
        Request("ant", preset="quack").check(opened().manifest)
    with pytest.raises(UsageError, match=r"this bundle has none \(dit-export tune\)"):
        Request(preset="quick").check(manifest.read(handmade("free")))
    output = ["-o", str(tmp_path / "x.npy")]
    assert main(["sample", str(handmade("labels")), "--labels", "ant", "--preset", "quack", *output]) == 2
    assert "known: quick, lean" in capsys.readouterr().err


def test_the_command_takes_it(opened, handmade, tmp_path) -> None:
    arguments = [
        "sample",
        str(handmade("labels")),
        "--labels",
        "ant",
        "dog",
        "--seed",
        "3",
        "-o",
        str(tmp_path / "x.npy"),
    ]
    assert main([*arguments, "--preset", "quick"]) == 0
    assert np.array_equal(np.load(tmp_path / "x.npy"), latents(opened(), **QUICK))


def test_people_see_fields_and_figures(handmade) -> None:
    text = summary(handmade("labels"), manifest.read(handmade("labels")))
    assert "preset     quick: steps 3, guidance 2, solver dpm++, spacing trailing, eta 0; measured: rows 6\n" in text


def test_a_preset_has_fields_of_a_request() -> None:
    assert PRESET_FIELDS.keys() <= vars(Request()).keys()
    assert SCHEMA["$defs"]["preset"]["properties"].keys() == {*PRESET_FIELDS, "measured"}
