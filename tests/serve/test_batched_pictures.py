"""Pictures of requests that share calls: bit for bit those of requests that are drawn alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_runtime import Pipeline, Request
from dit_runtime.serve import Batcher
from tests.serve.serving import WAIT

SOLVERS = ("ddpm", "ddim", "dpm++", "dpm++3")


def mixed(count: int, classes: int, seed: int = 0) -> list[Request]:
    """Return requests that differ in all that a client may choose."""
    choose = random.Random(seed)
    return [
        Request(
            choose.randrange(classes),
            steps=choose.randrange(5, 51) if count > 100 else choose.randrange(2, 9),
            guidance=choose.choice([1.0, 1.5, 2.5, 4.0, 8.0]),
            seed=number,
            solver=choose.choice(SOLVERS),
        )
        for number in range(count)
    ]


def furthest(bundle: Path, requests: list[Request], places: int) -> int:
    """Return the largest difference, in levels of 255, of pictures drawn together and alone."""
    with Pipeline.load(bundle, threads=1) as pipe:
        alone = [pipe.run(request).result() for request in requests]
    batcher = Batcher(Pipeline.load(bundle, threads=1), places=places)
    tickets = [batcher.submit(request) for request in requests]
    together = [ticket.result(WAIT * 10) for ticket in tickets]
    batcher.close()
    calls, samples = batcher.counts["calls"], batcher.counts["samples"]
    assert samples > 1.5 * calls  # they did share calls
    if not any(request.cache or request.guidance_policy for request in requests):
        assert samples == sum(ticket.evaluations for ticket in tickets)
    assert len({picture.tobytes() for picture in together}) == len(requests)  # and each drew its own
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(alone, together, strict=True))


def test_each_picture_is_the_one_drawn_alone(shared_embedders) -> None:
    assert furthest(shared_embedders.bundle, mixed(40, 1000), 8) == 0


def test_requests_that_skip_or_double_rows(shared_embedders) -> None:
    """Steps without a call, of one group, of two, and of two apart that take two places."""
    extras: list[dict[str, Any]] = [
        {"guidance_interval": (0.2, 0.8)},
        {"guidance_policy": "apg"},
        {"guidance_policy": "rescale", "guidance_interval": (0.0, 0.5)},
        {"cache": "taylorseer"},
        {"cache": "easycache", "guidance_policy": "apg"},
    ]
    requests = [
        replace(request, solver="ddim", steps=12, guidance=4.0, **extras[number % len(extras)])
        for number, request in enumerate(mixed(10, 1000, 1))
    ]
    assert furthest(shared_embedders.bundle, requests, 4) == 0


def test_also_in_int8_on_openvino(narrow) -> None:
    assert furthest(narrow("int8", "openvino"), mixed(12, 1000), 2) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "limit"), [("onnxruntime", 0), ("openvino", 1)])
def test_two_hundred_of_the_demo(tmp_path: Path, backend: str, limit: int) -> None:
    from dit_export.cli import main
    from dit_export.demo import store

    folder = tmp_path / "demo"
    assert main(["build", "--checkpoint", str(store.MODEL), "--backend", backend, "-o", str(folder)]) == 0
    assert furthest(folder, mixed(200, 20), 8) <= limit
