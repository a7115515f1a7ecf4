"""Each conditioning's cost: the same graphs as a build's, timed together, in a table."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from dit_export.bench import conditionings
from dit_export.bench.conditionings import Cost, main, measure, table
from dit_export.networks.spec import ModelSpec, with_conditioning
from dit_runtime.errors import UsageError
from dit_runtime.progress import Progress

SPEC = ModelSpec(depth=2, hidden=48, heads=3, patch=2, latent_size=8, num_classes=10)


@pytest.mark.slow
def test_the_conditionings_are_timed_in_turn(tmp_path, monkeypatch, one_thread) -> None:
    asked = []
    monkeypatch.setattr(conditionings, "in_a_row", lambda step: asked.append(step()) or float(len(asked)))
    specs = {way: with_conditioning(SPEC, way) for way in ("in-context", "adaln-zero")}
    with one_thread():
        costs = measure(specs, "onnxruntime", 2, 1, tmp_path, Progress(io.StringIO()))
    assert [cost.seconds for cost in costs.values()] == [1.0, 2.0]  # the least of rounds 1, 3 and 2, 4
    assert all({*answer} == {"prediction", "variance"} for answer in asked)
    hoisted = {way: cost.gmac - cost.in_loop for way, cost in costs.items()}
    assert hoisted["adaln-zero"] > 3 * hoisted["in-context"] > 0 and min(cost.in_loop for cost in costs.values()) > 0
    stages = {file.name.split(".")[0] for file in tmp_path.glob("*/*")}
    assert stages == {"denoiser"} and not [*tmp_path.glob("*.traced")]  # XL/2's would be 5 times 4 GB


def test_what_memory_does_not_hold_is_not_begun(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(conditionings, "available_memory", lambda: 1e9)
    wide = {way: with_conditioning(replace(SPEC, hidden=4800), way) for way in ("adaln", "in-context")}
    with pytest.raises(UsageError, match=r"2 denoisers on onnxruntime take \d+ GB, 1 GB are free"):
        measure(wide, "onnxruntime", 1, None, tmp_path, Progress(io.StringIO()))
    with pytest.raises(UsageError, match="at least 1"):
        measure({}, "onnxruntime", 0, None, tmp_path, Progress(io.StringIO()))


def test_the_table() -> None:
    costs = {"S/8": {"adaln": Cost(0.4, 0.36, 0.00312)}, "XL/2": {"adaln": Cost(118.5, 118.4, 2.3)}}
    assert table(costs).splitlines()[2:] == ["| `adaln` | 0.40 | 0.36 | 3.12 ms | 118.50 | 118.40 | 2.30 s |"]
    assert len({line.count("|") for line in table(costs).splitlines()}) == 1
    with pytest.raises(UsageError, match="model 'XL/3' is not known"):
        main(["XL/3"])
