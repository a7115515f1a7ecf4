"""Requests that share calls: their bits, and what one of them cannot do to the others."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_runtime import EngineError, Pipeline, Request, Stopped, UsageError, images
from dit_runtime.errors import NotFinite
from dit_runtime.run import Run
from dit_runtime.sampling.process import Process, Sampler
from dit_runtime.sampling.solvers import levels, plan
from dit_runtime.serve import Batcher, Busy, Closed, Late, Ticket, preview
from dit_runtime.serve.shared import SharedMemo

WAIT = 60  # seconds for what takes a fraction of one
POISON = 6.5  # the weight of guidance of the request that an engine below fails for
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


class Watched:
    """The engine of a stage; each call waits until it may go on, and fails where a sample's guidance is POISON."""

    def __init__(self, engine: Any, error: Exception | None = None) -> None:
        self.engine, self.io, self.close, self.error = engine, engine.io, engine.close, error
        self.calls: list[tuple[int, int]] = []  # groups, samples
        self.gate = threading.Semaphore(10**6)
        self.entered = threading.Semaphore(0)

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.entered.release()
        assert self.gate.acquire(timeout=WAIT)
        self.calls.append(inputs["conditioning"].shape[:2])
        poisoned = inputs["guidance"] == np.float32(POISON)
        if poisoned.any() and self.error is not None:
            raise self.error
        # Each sample alone: the sums of hand-made graphs depend on the batch, and bits are compared here.
        rows = [
            self.engine.run({name: a[:, [i]] if name == "conditioning" else a[[i]] for name, a in inputs.items()})
            for i in range(len(poisoned))
        ]
        outputs = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        outputs["prediction"][poisoned] = np.nan
        return outputs

    def hold(self) -> None:
        """Let no further call through."""
        while self.gate.acquire(blocking=False):
            pass


Serve = Callable[..., tuple[Batcher, Watched]]


@pytest.fixture
def serve(opened, bundle) -> Iterator[Serve]:
    """Serves the hand-made bundle through a watched engine."""
    batchers: list[Batcher] = []

    def start(places: int | None = 3, error: Exception | None = None, **options: Any) -> tuple[Batcher, Watched]:
        pipe = Pipeline.load(bundle, threads=1)
        watched = Watched(pipe.engines.opened["denoiser"], error)
        pipe.engines._opened["denoiser"] = watched
        batchers.append(Batcher(pipe, places=places, **options))
        watched.calls.clear()
        while watched.entered.acquire(blocking=False):
            pass
        return batchers[-1], watched

    yield start
    for batcher in batchers:
        if batcher.alive:
            batcher.close(drain=False)


def alone(batcher: Batcher, request: Request) -> np.ndarray:
    return Batcher.submit(batcher, request).result(WAIT)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), None])
def test_a_request_that_fails_fails_alone(serve: Serve, error: Exception | None) -> None:
    """The engine refuses a batch because of one of its samples, or gives NaN for it."""
    batcher, _ = serve(error=error)
    sound = [Request(label, steps=4, guidance=3.0, seed=label) for label in range(3)]
    expected = [alone(batcher, request) for request in sound]
    tickets = [batcher.submit(request) for request in [*sound[:1], Request(1, steps=4, guidance=POISON), *sound[1:]]]
    with pytest.raises(EngineError if error else NotFinite, match="out of memory" if error else "not finite"):
        tickets.pop(1).result(WAIT)
    for ticket, picture in zip(tickets, expected, strict=True):
        assert np.array_equal(ticket.result(WAIT), picture)
    assert batcher.counts["failed"] == 1 and batcher.alive and batcher.active == 0


def test_a_client_that_cancels_its_future_harms_nobody(serve: Serve) -> None:
    """A future that could be cancelled would raise in the batcher's thread when it gets its result."""
    batcher, watched = serve()
    watched.hold()
    left, stays = batcher.submit(Request(1, steps=3)), batcher.submit(Request(2, steps=3))
    assert not left.future.cancel()
    watched.gate.release(10**6)
    assert left.result(WAIT).shape == stays.result(WAIT).shape
    assert batcher.alive


def test_cancelled_within_a_step(serve: Serve) -> None:
    batcher, watched = serve()
    watched.hold()
    tickets = [batcher.submit(Request(label, steps=50, guidance=3.0)) for label in range(3)]
    assert watched.entered.acquire(timeout=WAIT)  # of the first call, which has one request or more
    watched.gate.release()
    assert watched.entered.acquire(timeout=WAIT)
    tickets[0].cancel()
    watched.gate.release()  # the call that is under way
    assert watched.entered.acquire(timeout=WAIT)  # the next one
    with pytest.raises(Stopped, match=r"stopped after step \d of 50"):
        tickets[0].result(WAIT)
    assert batcher.active == 2 and batcher.counts["cancelled"] == 1
    for ticket in tickets:
        ticket.cancel()
    watched.gate.release(10**6)
    for ticket in tickets[1:]:
        with pytest.raises(Stopped):
            ticket.result(WAIT)
    assert batcher.active == batcher.queued == 0


def test_requests_join_and_leave_between_steps(serve: Serve) -> None:
    batcher, watched = serve()
    watched.hold()
    long = batcher.submit(Request(0, steps=6, guidance=3.0))
    assert watched.entered.acquire(timeout=WAIT)
    short = batcher.submit(Request(1, steps=2, guidance=2.0))
    unguided = batcher.submit(Request(2, steps=2, guidance=1.0))
    watched.gate.release(10**6)
    for ticket in (long, short, unguided):
        ticket.result(WAIT)
    assert sorted(watched.calls) == [(1, 1)] * 2 + [(2, 1)] * 4 + [(2, 2)] * 2
    assert (short.stats.calls, short.stats.batch) == (2, 2.0)
    assert (long.stats.calls, long.stats.batch) == (6, 8 / 6)
    assert (unguided.stats.calls, unguided.stats.batch) == (2, 1.0)
    for ticket in (long, short, unguided):
        parts = ticket.stats.queue + ticket.stats.conditions + ticket.stats.steps + ticket.stats.decode
        assert 0 < parts <= ticket.stats.total


def test_a_short_request_passes_a_long_one(serve: Serve) -> None:
    """Also where calls have one sample."""
    batcher, watched = serve(places=1, clock=lambda: 0.0)
    watched.hold()
    ended: list[str] = []
    tickets: list[Ticket] = []
    for name, steps in (("long", 50), ("short", 2)):
        tickets.append(batcher.submit(Request(1, steps=steps, guidance=3.0)))
        tickets[-1].future.add_done_callback(lambda _, name=name: ended.append(name))
        if name == "long":
            assert watched.entered.acquire(timeout=WAIT)
    watched.gate.release(10**6)
    for ticket in tickets:
        ticket.result(WAIT)
    assert ended == ["short", "long"]


def test_deadlines(serve: Serve) -> None:
    """Time is the test's: nobody is late because the machine is busy."""
    now = [0.0]
    batcher, watched = serve(clock=lambda: now[0])
    batcher.costs.update("row", 1.0)
    for _ in range(400):
        batcher.costs.update("row", 1.0)
    watched.hold()
    first = batcher.submit(Request(1, steps=5, guidance=3.0), deadline=12.0)  # 10 rows
    assert watched.entered.acquire(timeout=WAIT)
    with pytest.raises(Busy) as busy:
        batcher.submit(Request(1, steps=5, guidance=3.0), deadline=12.0)
    assert busy.value.retry_after == pytest.approx(8, abs=0.1)  # 20 of work
    assert batcher.counts["refused"] == 1
    now[0] = 12.5
    watched.gate.release(10**6)
    with pytest.raises(Late, match="not finished within 12 s"):
        first.result(WAIT)
    assert batcher.counts["late"] == 1 and batcher.active == 0


def test_what_is_wrong_with_a_request_is_said_at_once(serve: Serve) -> None:
    batcher, watched = serve()
    with pytest.raises(UsageError, match="label 99 is out of range"):
        batcher.submit(Request(99))
    assert not watched.calls


def test_close_finishes_or_stops_what_is_in_line(serve: Serve) -> None:
    for drain in (True, False):
        batcher, watched = serve()
        watched.hold()
        ticket = batcher.submit(Request(1, steps=4))
        assert watched.entered.acquire(timeout=WAIT)
        closing = threading.Thread(target=batcher.close, args=(drain,))
        closing.start()
        while True:  # until the batcher refuses, it is not closing yet
            try:
                batcher.submit(Request(1, steps=4)).cancel()
            except Closed:
                break
        watched.gate.release(10**6)
        closing.join(WAIT)
        if drain:
            assert ticket.result(WAIT).shape == (1, 32, 32, 3)
        else:
            with pytest.raises(Stopped):
                ticket.result(WAIT)
        assert not batcher.alive


def test_a_loop_that_breaks_down_leaves_nobody_waiting(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    batcher, watched = serve()
    watched.hold()
    ticket = batcher.submit(Request(1, steps=4))
    assert watched.entered.acquire(timeout=WAIT)
    monkeypatch.setattr(batcher, "_tell", None)
    monkeypatch.setattr(batcher, "_fail", None)
    watched.gate.release(10**6)
    with pytest.raises(TypeError):
        ticket.result(WAIT)
    with pytest.raises(Closed):
        batcher.submit(Request(1))


def test_stages_before_the_loop_run_once_a_row(serve: Serve) -> None:
    batcher, _ = serve()
    first = batcher.submit(Request(1, steps=4, guidance=3.0, seed=1)).result(WAIT)
    seen = batcher.memo.misses
    assert seen == 2 * 4  # the label and what guidance leads away from, at each timestep
    again = batcher.submit(Request(1, steps=4, guidance=3.0, seed=1)).result(WAIT)
    assert batcher.memo.misses == seen and batcher.memo.hits == 2 * 4 and np.array_equal(first, again)
    batcher.submit(Request(2, steps=4, guidance=3.0)).result(WAIT)
    assert batcher.memo.misses == seen + 4


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
