"""Int8 of a network without conditions: as many pictures are measured, and the search needs no null row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dit_export.networks import Network
from dit_export.precision.budget import SearchOptions
from dit_export.precision.measure import Plan
from dit_runtime.bundle.manifest import Port
from dit_runtime.pipeline import Pipeline
from tests.precision.conftest import Scratch, open_search, scratch


class Tokens(nn.Module):
    """An MLP on normalized tokens, moved by the time, between a linear that reads the state and one that gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.time, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(1, 8), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(approximate="tanh"), nn.Linear(32, 8))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x + self.mlp(self.norm(x) + self.time(t[:, None] / 1000)[:, None]))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, one_thread) -> Scratch:
    torch.manual_seed(0)
    ports = (Port("x", "state", "float32", (6, 8)), Port("t", "time", "float32", ()))
    network = Network(Tokens().eval().requires_grad_(False), ports, model={"name": "tokens"})
    with one_thread():
        return scratch(tmp_path_factory.mktemp("tokens") / "bundle", network)


def test_a_seed_for_each_picture(tokens: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, sample = [], Pipeline.sample
    monkeypatch.setattr(Pipeline, "sample", lambda *own, **more: seeds.append(more["seed"]) or sample(*own, **more))
    calibration = tokens.calibrate(Plan(pictures=6, steps=2, batch=4))
    assert seeds == [[1000, 1001, 1002, 1003], [1004, 1005]] and len(calibration.layers) == 2


def test_it_can_be_timed(tokens: Scratch, tmp_path: Path) -> None:
    calibration = tokens.calibrate(Plan(pictures=2, steps=2))
    with open_search(tmp_path / "search", tokens, calibration, "onnxruntime") as search:
        outcome = search.run(SearchOptions(tune=True), [])
    assert [entry.layer for entry in outcome.layers] == ["mlp.0", "mlp.2"]
