"""The programs in examples/: each builds its own network; a process without PyTorch samples as PyTorch does."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from dit_runtime.bundle import manifest
from examples import robot_policy, speech

NO_TEXT = {"text": np.zeros((2, speech.LENGTH), np.int64), "spoken": np.ones((2, speech.LENGTH), np.float32)}
CONDITIONS = {
    robot_policy: (robot_policy.observations(2), None),
    speech: (speech.texts("good morning", "see you"), NO_TEXT),
}
BEFORE = {robot_policy: ("condition", "time+condition"), speech: ("condition", "time")}  # what left the loop


def euler(example, conditions, negatives, seed: int = 0) -> np.ndarray:
    """Follow the flow by hand, in PyTorch."""
    network, steps = example.network(), example.PROCESS.sampler.steps
    rows, nulls = ({k: torch.from_numpy(v) for k, v in (c or {}).items()} for c in (conditions, negatives))
    x = torch.randn(2, *network.ports[0].shape, generator=torch.Generator().manual_seed(seed)).double()
    for step in range(steps, 0, -1):
        t = torch.full((2,), step / steps)
        with torch.no_grad():
            velocity = network.module(x.float(), t, **rows).double()
            if nulls:
                null = network.module(x.float(), t, **nulls).double()
                velocity = null + network.guidance * (velocity - null)
        x = x - velocity / steps
    return x.numpy()


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("example", CONDITIONS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_an_example_samples_as_pytorch(example, tmp_path, one_thread) -> None:
    with one_thread():
        got = example.main(tmp_path)
    conditions, negatives = CONDITIONS[example]
    assert error(got, euler(example, conditions, negatives)) <= 1e-5  # fp32 sums in another order, many steps long
    swapped = {name: rows[::-1].copy() for name, rows in conditions.items()}
    assert error(got, euler(example, swapped, negatives)) > 1e-3
    assert error(got, euler(example, conditions, negatives, seed=1)) > 1e-2
    assert [stage.runs for stage in manifest.read(tmp_path / "bundle").stages] == [*BEFORE[example], "step", "update"]


@pytest.mark.parametrize("example", CONDITIONS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_pytorch_is_absent_where_an_example_samples(example) -> None:
    blocked = example.SAMPLE.partition("import numpy")[0]
    for package in ("torch", "dit_export"):
        done = subprocess.run([sys.executable, "-c", blocked + f"import {package}"], capture_output=True, text=True)
        assert done.returncode and f"import of {package} halted" in done.stderr
