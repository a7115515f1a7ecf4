"""The gate as a user runs it, a baseline of the small bundle, and the same network some training later."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from dit_export.cli import main
from tests.conftest import HEADS, META_NAMES, Built, build, meta_state
from tests.once import once


class Verdict(NamedTuple):
    code: int
    first: dict | None
    located: list[str]
    taps: dict[str, float]
    failed: set[tuple[str, str]]


@pytest.fixture
def regress(capsys) -> Callable[..., Verdict]:
    def run(bundle: Path, *options: str) -> Verdict:
        capsys.readouterr()
        code = main(["regress", str(bundle), "--threads", "1", "--json", *options])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        if code == 2:
            return Verdict(code, None, [captured.err.splitlines()[-1]], {}, set())
        table = json.loads(captured.out, parse_constant=pytest.fail)  # JSON knows no NaN
        failed = {(figure["stage"], figure["metric"]) for figure in table["checks"] if not figure["passed"]}
        assert table["passed"] == (not failed) == (code == 0)
        taps = {tap["name"]: tap["error"] for tap in table["taps"]}
        return Verdict(code, table["first"], table["located"], taps, failed)

    return run


@pytest.fixture(scope="session")
@once
def baseline(meta, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("baseline") / "meta.json"
    assert main(["regress", str(meta.bundle), "--threads", "1", "--baseline", str(path), "--update-baseline"]) == 0
    return path


@pytest.fixture(scope="session")
@once
def later(tmp_path_factory, one_thread) -> Built:
    """The same network some training later: every weight a little elsewhere."""
    import torch

    folder = tmp_path_factory.mktemp("later")
    random = torch.Generator().manual_seed(7)
    state = {
        name: w * (1 + 0.02 * torch.randn(w.shape, generator=random)) if w.is_floating_point() else w
        for name, w in meta_state().items()
    }
    torch.save({"ema": state}, folder / "checkpoint.pt")
    (folder / "labels.txt").write_text("\n".join(META_NAMES))
    options = ["--heads", str(HEADS), "--latents-only", "--labels", str(folder / "labels.txt"), "--max-batch", "4"]
    with one_thread():
        return build(folder, "checkpoint.pt", *options)
