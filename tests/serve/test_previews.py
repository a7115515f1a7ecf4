"""Previews of pictures under way, and the listeners that get them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dit_runtime import Request, images
from dit_runtime.sampling.process import Process, Sampler
from dit_runtime.sampling.solvers import levels, plan
from dit_runtime.serve import preview
from tests.serve.serving import WAIT
from tests.serve.watched import Serve


def test_previews(serve: Serve) -> None:
    """x₀ as the network predicts it: after the last step of ddim that is the picture itself."""
    batcher, _ = serve()
    heard: list[tuple[int, int, Any]] = []
    request = Request(1, steps=6, guidance=3.0, solver="ddim")
    picture = batcher.submit(request, listener=lambda *event: heard.append(event), previews=2).result(WAIT)
    assert [(done, total) for done, total, _ in heard] == [(number, 6) for number in range(1, 7)]
    assert [done for done, _, pictures in heard if pictures is not None] == [2, 4]
    assert all(pictures.shape == picture.shape for _, _, pictures in heard if pictures is not None)

    pipe = batcher.pipe
    process, run = pipe.manifest.process, pipe.run(request, host=True)
    known = levels(process, "ddim", 6, None)
    for number in range(6):
        ask = run.ask()
        answer = pipe.engines.run(pipe.manifest.step, {"latents": ask.state.astype(np.float32), **ask.inputs(slice(1))})
        shown = preview.pictures(pipe, known[number], ask.state, answer["prediction"])
        run.tell(*answer.values())
        if number in (1, 3):
            assert np.array_equal(shown, heard[number][2])
    assert np.array_equal(shown, run.result()) and np.array_equal(shown, picture)


@pytest.mark.parametrize("extras", [{"cache": "taylorseer"}, {"guidance_policy": "apg"}])
def test_previews_where_no_network_gives_them(serve: Serve, extras: dict[str, Any]) -> None:
    """After steps that a cache predicts, and of predictions that the host mixes."""
    batcher, _ = serve()
    shown: list[np.ndarray] = []
    listener = lambda done, total, pictures: shown.extend([] if pictures is None else [pictures])  # noqa: E731
    request = Request(1, steps=12, guidance=3.0, solver="ddim", **extras)
    batcher.submit(request, listener=listener, previews=4).result(WAIT)
    pipe = batcher.pipe
    known, run = levels(pipe.manifest.process, "ddim", 12), pipe.run(request, host=True)
    after = sorted(preview.spread(4, 12))
    expected, asked = [], []
    for done in range(1, 12):
        asked.append(run.ask() is not None)
        run.step()
        if done in after:
            expected.append(preview.pictures(pipe, known[done - 1], *run.last))
    assert ("cache" in extras) == (not all(asked[done - 1] for done in after))
    assert len(shown) == len(expected) == 4
    assert all(np.array_equal(a, b) for a, b in zip(shown, expected, strict=True))


def test_levels_of_solvers_that_evaluate_twice() -> None:
    process = Process(prediction="velocity", sampler=Sampler(solver="heun", steps=4))
    known = levels(process, "heun", 4, None)
    assert [level.time for level in known] == plan(process, "heun", 4).tolist() and len(known) == 8


def test_a_listener_that_raises_fails_its_own_request(serve: Serve) -> None:
    def raise_(*_: object) -> None:
        raise KeyError("gone")

    batcher, _ = serve()
    bad, good = batcher.submit(Request(1, steps=3), listener=raise_), batcher.submit(Request(2, steps=3))
    with pytest.raises(KeyError):
        bad.result(WAIT)
    assert images.png(good.result(WAIT)[0])
