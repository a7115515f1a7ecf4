"""`dit-server` under load on the demo, against the bars of `dit-serve` and its pictures. All are slow."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dit_runtime import Pipeline, Request
from dit_runtime.serve import Batcher
from tests.cpp.test_server import GENERATIONS, Start
from tests.serve import load
from tests.serve.serving import Running, pixels
from tests.serve.soak import soak
from tests.serve.test_load import (  # noqa: F401 - the bars of dit-serve, with this file's `served`
    test_leaving_silent_and_unread_clients,
    test_ten_times_what_it_can_do,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    from dit_export.cli import main
    from dit_export.demo import store

    folder = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["build", "--checkpoint", str(store.MODEL), "--backend", "onnxruntime", "-o", str(folder)]) == 0
    return folder


@pytest.fixture
def served(start: Start, demo: Path) -> Iterator[tuple[int, Running]]:
    with start(f"demo={demo}", "--deadline", "5", "--batch", "8", "--skip-verify") as (started, client, _):
        yield started.pid, client


@pytest.mark.slow
def test_soak(build: Path, demo: Path) -> None:
    """For SOAK_SECONDS, by default half an hour."""
    program = [str(build / "programs/dit-server")]
    seconds = float(os.environ.get("SOAK_SECONDS", "1800"))
    soak(demo, seconds, 10, 20, "--batch", "8", "--skip-verify", program=program)


@pytest.mark.slow
def test_200_mixed_requests_get_the_bits_that_they_get_alone(build: Path, demo: Path) -> None:
    """Steps, solvers, guidance, policies, caches, labels, seeds and presets, through the batcher's C++."""
    command = [build / "tests/unit-tests", "--gtest_filter=Batcher.TwoHundredMixedRequests"]
    done = subprocess.run(command, env=os.environ | {"DIT_MIXED_BUNDLE": str(demo)}, capture_output=True, text=True)
    assert done.returncode == 0 and "[  PASSED  ] 1 test." in done.stdout, done.stdout


@pytest.mark.slow
def test_200_mixed_requests_have_pythons_pictures(start: Start, demo: Path) -> None:
    """dit-server's batches against Python's: the same ONNX Runtime, and so the same bits up to rounding to uint8."""
    choose = load.random.Random(1)
    requests = [
        {
            "prompt": str(choose.randrange(20)),
            "seed": choose.randrange(2**32),
            "num_inference_steps": choose.randrange(5, 51),
            "solver": choose.choice(["ddim", "dpm++", "unipc", "deis"]),
            "guidance_scale": choose.choice([1.0, 2.5, 8.0]),
        }
        for _ in range(200)
    ]
    drawn: dict[int, np.ndarray] = {}
    with start(f"demo={demo}", "--skip-verify", "--deadline", "600", "--batch", "8") as (_, client, _):

        def ask(first: int) -> None:
            for number in range(first, 200, 8):
                answer = client.ask("POST", GENERATIONS, requests[number] | {"response_format": "bytes"})
                drawn[number] = pixels(answer.body)

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    batcher = Batcher(Pipeline.load(demo, threads=1), places=8)
    names = {"num_inference_steps": "steps", "guidance_scale": "guidance", "seed": "seed", "solver": "solver"}
    for number, body in enumerate(requests):
        fields = {own: body[name] for name, own in names.items()}
        expected = batcher.submit(Request(int(body["prompt"]), **fields)).result()
        assert np.abs(drawn[number].astype(int) - expected[0]).max() <= 1, body
    batcher.close()
