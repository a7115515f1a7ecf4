"""Requests that share calls: how they join, leave, fail and end, and what one of them cannot do to the others."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from dit_runtime import EngineError, Request, Stopped, UsageError
from dit_runtime.errors import NotFinite
from dit_runtime.serve import Batcher, Busy, Closed, Late, Ticket
from tests.serve.serving import WAIT
from tests.serve.watched import POISON, Serve


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
