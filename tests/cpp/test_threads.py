"""Threads that draw with one model of libdit share its weights and activations; and calls that are cancelled."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dit_export.cli import main
from tests.cpp.test_same_pictures import ENGINES


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The paper's S/2: 131 MB of weights. Of its conditioning a run holds 0.23 MB a step."""
    folder = tmp_path_factory.mktemp("small") / "bundle"
    assert main(["build", "S/2", "--synthetic", "--latents-only", "--backend", "onnxruntime", "-o", str(folder)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_four_threads_share_a_model(build, small, engine) -> None:
    def most_resident(threads: int) -> int:
        """Return bytes; a call that fails, of the threads or of dit_model_info beside them, ends the program with 1."""
        command = [build / "tests/threads", small, engine, str(threads), "4"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        resident, answers, _ = done.stdout.split()
        assert int(answers) > 10
        return int(resident)

    one = most_resident(1)
    assert one > 150e6 and most_resident(4) <= 1.05 * one


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_may_end_while_a_cancelled_call_compiles(build, tiny, engine) -> None:
    """The program exits with 1 if a process ends with a signal."""
    done = subprocess.run([build / "tests/cancel", tiny, engine, "1"], capture_output=True, text=True)
    assert done.returncode == 0 and "open, engines not loaded: " in done.stdout, done.stderr
