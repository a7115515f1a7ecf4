"""The memory of a batcher: rows that requests share, and what goes when a run has ended."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from dit_runtime import Request
from dit_runtime.run import Run
from dit_runtime.serve import Batcher
from dit_runtime.serve.shared import SharedMemo
from tests.serve.serving import WAIT
from tests.serve.watched import Serve


def test_stages_before_the_loop_run_once_a_row(serve: Serve) -> None:
    batcher, _ = serve()
    first = batcher.submit(Request(1, steps=4, guidance=3.0, seed=1)).result(WAIT)
    misses = batcher.memo.misses
    assert misses == 2 * 4  # the label and what guidance leads away from, at each timestep
    again = batcher.submit(Request(1, steps=4, guidance=3.0, seed=1)).result(WAIT)
    assert batcher.memo.misses == misses and batcher.memo.hits == 2 * 4 and np.array_equal(first, again)
    batcher.submit(Request(2, steps=4, guidance=3.0)).result(WAIT)
    assert batcher.memo.misses == misses + 4


def test_a_run_that_has_ended_holds_no_memory(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until the garbage collector comes: XL/2's rows of a run are up to 256 MB."""
    batcher, _ = serve()
    runs: list[weakref.ref[Run]] = []
    start = batcher.pipe.run

    def watched(*arguments: Any, **options: Any) -> Run:
        run = start(*arguments, **options)
        runs.append(weakref.ref(run))
        return run

    monkeypatch.setattr(batcher.pipe, "run", watched)
    gc.disable()
    try:
        tickets = [batcher.submit(Request(label, steps=3, guidance=2.0)) for label in (1, 2)]
        for ticket in tickets:
            ticket.result(WAIT)
        batcher.close()
        assert len(runs) == 2 and not any(run() for run in runs)
    finally:
        gc.enable()


def test_runs_share_the_memory_for_rows(opened) -> None:
    """A run holds the rows of some timesteps where it cannot hold all, and draws the same."""
    pipe = opened("labels")
    (stage,) = pipe.manifest.before_loop
    row = sum(4 * int(np.prod(spec.shape[1:])) for spec in stage.gives)
    request = Request(1, steps=9, guidance=3.0)
    expected = pipe.run(request).result()
    calls: list[int] = []
    run = pipe.engines.run

    def counted(asked: Any, inputs: Any, *into: Any) -> Any:
        calls.extend([len(inputs["labels"])] if asked is stage else [])
        return run(asked, inputs, *into)

    pipe.engines.run = counted
    batcher = Batcher(pipe, places=2, memo_bytes=2 * 2 * 3 * row)  # three for each of those under way
    calls.clear()
    assert np.array_equal(batcher.submit(request).result(WAIT), expected)
    assert calls == [2] * 9  # its own condition's and the other one's, a timestep a time
    batcher.close()


def test_the_memo_keeps_what_was_used_last(opened) -> None:
    pipe = opened("labels")
    (stage,) = pipe.manifest.before_loop
    calls: list[int] = []

    def compute(asked: Any, inputs: Any) -> Any:
        calls.append(len(inputs["labels"]))
        return pipe.engines.run(asked, inputs)

    def ask(memo: SharedMemo, *labels: int) -> np.ndarray:
        inputs = {"labels": np.array(labels), "timesteps": np.full(len(labels), 7, np.float32)}
        expected = pipe.engines.run(stage, inputs)
        outputs = memo(stage, inputs)
        assert all(np.allclose(outputs[name], expected[name], rtol=1e-6) for name in expected)
        return outputs["conditioning"]

    row = ask(SharedMemo(compute), 0)[0].nbytes
    memo = SharedMemo(compute, 2 * row)
    calls.clear()
    ask(memo, 0, 1, 0)
    ask(memo, 0)
    ask(memo, 2)  # takes the place of 1
    ask(memo, 0, 2)
    assert calls == [2, 1] and memo.bytes == 2 * row
    ask(memo, 1)
    ask(memo, 2)
    assert calls == [2, 1, 1] and (memo.hits, memo.misses) == (5, 4)
    ask(memo, 0, 1, 3)  # more than the memo holds
    assert memo.bytes == 2 * row
