"""Each hostile checkpoint is read or refused: in one line, soon, in little memory, and no code of it runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dit_runtime.console import guarded
from tests.hostile.checkpoints import CHECKPOINTS
from tests.hostile.originals import make
from tests.hostile.test_bundles import BYTES, SECONDS, check_output, forget_peak, peak, within

SAMPLED = 25
CODES = {"fine": 0, "refused": 2, "survives": None}


@pytest.fixture(scope="session")
def originals(tmp_path_factory, one_thread):
    folder, made = tmp_path_factory.mktemp("checkpoints"), set()

    def original(kind: str) -> Path:
        place = folder / (f"{kind}.pt" if kind == "meta" else kind)
        if kind not in made:
            with one_thread():
                make(place, kind)
            made.add(kind)
        return place

    return original


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(damage, id=damage.name[:60], marks=[pytest.mark.slow] * bool(number % SAMPLED))
        for number, damage in enumerate(CHECKPOINTS)
    ],
)
def test_verdict(damage, originals, tmp_path, monkeypatch, capfd, listing) -> None:
    from dit_export.checkpoints import load
    from dit_export.recipe import Recipe

    place, original = tmp_path / originals(damage.kind).name, originals(damage.kind)
    shutil.copytree(original, place) if original.is_dir() else shutil.copy(original, place)
    damage.apply(place)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    recipe = Recipe(
        checkpoint=str(place), heads=4 if damage.kind == "meta" else None, latents_only=damage.kind == "meta"
    )
    before = listing(tmp_path)
    forget_peak()
    start = peak()
    capfd.readouterr()
    with within(SECONDS):
        code = guarded("dit-run", lambda _: load(recipe) and 0, [])
    captured = capfd.readouterr()
    expected = CODES[damage.verdict]
    assert code != 1
    check_output(code, expected, captured.out.encode(), captured.err.encode())
    assert peak() - start < BYTES
    assert listing(tmp_path) == before
