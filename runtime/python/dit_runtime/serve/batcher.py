"""Step-level batching: requests that wait for the step stage share its next call.

Requests may differ in step, number of steps, solver, guidance, condition and seed. Each gets the bits that it gets
alone, because a bundle's engines are batch invariant; where they are not, a call has one request. One thread owns the
engines. Between two calls requests join, leave, fail or are cancelled.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime import images
from dit_runtime.conditions.memo import BUDGET, side_by_side
from dit_runtime.errors import Stopped
from dit_runtime.pipeline import Pipeline
from dit_runtime.request import Request
from dit_runtime.serve import preview
from dit_runtime.serve.rows import Sized, measure
from dit_runtime.serve.scheduler import Costs, Job, Scheduler
from dit_runtime.serve.shared import SharedMemo
from dit_runtime.serve.ticket import Busy, Closed, Late, Listener, Ticket

LOOK = 0.02  # seconds for which the answer of `lateness` holds
Answer = tuple[NDArray[Any], NDArray[Any] | None]  # prediction, variance


class Batcher:
    """Draws requests of one open bundle; any thread may submit."""

    def __init__(
        self,
        pipe: Pipeline,
        *,
        places: int | None = None,
        memo_bytes: int = BUDGET,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Measure the step stage, and start the thread. `places` is the most samples that share a call; None: as
        many as the measured times say.

        From now on the pipeline belongs to the batcher, which closes it.
        """
        self.pipe, self._clock = pipe, clock
        self.sizes: dict[str, Sized] = {}
        for contract in pipe.manifest.each_size:
            at = pipe.at(contract.size or None)
            self.sizes[contract.size] = Sized(at, measure(at.engines), places)
        self.memo = SharedMemo(pipe.engines.run, memo_bytes)
        for sized in self.sizes.values():
            engines = sized.pipe.engines
            engines.compute, engines.memo_bytes = self.memo, memo_bytes // (2 * sized.places)  # of each under way
        first = next(iter(self.sizes.values()))
        for sized in self.sizes.values():
            sized.weight = sized.row / first.row
        self.costs = Costs()
        self.costs.update("row", first.row)
        self._scheduler: Scheduler[Ticket] = Scheduler(max(size.places for size in self.sizes.values()), self.costs)
        self._undecoded: deque[Ticket] = deque()
        self.counts: Counter[str] = Counter()  # calls, rows, drawn, refused, late, cancelled, failed
        self.seconds = {"step": 0.0, "decode": 0.0}  # in calls
        self._wake = threading.Condition()
        self._closing = False
        self._charged = clock()  # until when the thread's time is in the costs
        self._full = (0.0, 0.0, 0.0)  # a deadline, and until when it has that lateness
        self._thread = threading.Thread(target=self._guarded_loop, name="batcher", daemon=True)
        self._thread.start()

    @property
    def places(self) -> int:
        return self._scheduler.places

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def queued(self) -> int:
        """Return how many requests wait to be started."""
        with self._wake:
            return sum(not job.started for job in self._scheduler.jobs)

    @property
    def active(self) -> int:
        """Return how many requests are under way."""
        with self._wake:
            return sum(job.started for job in self._scheduler.jobs) + len(self._undecoded)

    def submit(
        self,
        request: Request,
        *,
        deadline: float | None = None,
        listener: Listener | None = None,
        previews: int = 0,
    ) -> Ticket:
        """Check a request and put it in line; raise UsageError, or Busy where its `deadline`
        in seconds is out of reach.

        The listener gets so many `previews`, evenly spread over the steps.
        """
        now = self._clock()
        sized = self.sizes[self.pipe.manifest.at(request.size).size]
        checked = request.check(self.pipe.manifest, self.pipe.engines.tokenizers)
        evaluations = len(checked.timesteps)
        groups = 1 if checked.negative is None else 2
        ticket = Ticket(
            samples=checked.samples,
            left=checked.samples * evaluations * groups,
            kind=(sized.pipe.manifest.size, groups),
            places=checked.samples,
            most=sized.places,
            weight=sized.weight,
            sized=sized,
            arrived=now,
            deadline=None if deadline is None else now + deadline,
            request=request,
            evaluations=evaluations,
            rows=evaluations * groups,
            listener=listener,
            previews=preview.plan(checked, previews),
        )
        with self._wake:
            if self._closing:
                raise Closed("this bundle takes no more requests")
            if (late := self._scheduler.lateness(ticket)) > 0:
                self.counts["refused"] += 1
                raise Busy(late)
            self._scheduler.push(ticket)
            self._wake.notify()
        return ticket

    def lateness(self, deadline: float) -> float:
        """Return by how many seconds what is ahead of any request with this deadline is too much; 0: there is room.

        A host asks before it reads a request. That there is no room holds for LOOK seconds: where many are refused, the
        thread needs the lock and the interpreter.
        """
        now = self._clock()
        with self._wake:
            known, until, late = self._full
            if deadline != known or now >= until:
                late = self._scheduler.lateness(Job(0, 0, arrived=now, deadline=now + deadline))
                self._full = deadline, now + (LOOK if late else 0), late
        return late

    def close(self, drain: bool = True) -> None:
        """Finish what is in line, or without `drain` stop it; then close the pipeline."""
        with self._wake:
            self._closing = True
            for job in [] if drain else self._scheduler.jobs:
                job.cancel()
            self._wake.notify()
        self._thread.join()
        with self._wake:  # of two who close, one comes second and finds nothing open
            self.pipe.close()

    def _guarded_loop(self) -> None:
        """Leave nobody waiting where the loop itself breaks down."""
        try:
            self._loop()
        except BaseException as error:
            with self._wake:
                self._closing = True
            for ticket in [*self._scheduler.jobs, *self._undecoded]:
                if not ticket.future.done():
                    ticket.future.set_exception(error)
            raise

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._scheduler.jobs or self._undecoded or self._closing):
                    self._wake.wait()
                    self._charged = self._clock()
                if not (self._scheduler.jobs or self._undecoded):
                    return
                self._drop_out()
                picked = self._scheduler.pick()
                for ticket in picked:
                    if not ticket.started:
                        ticket.started, ticket.stats.queue = True, self._clock() - ticket.arrived
            fresh = [ticket for ticket in picked if ticket.run is None]
            for ticket in fresh:
                self._start(ticket)
            if fresh:  # their first call may be of another kind
                continue
            if picked:
                self._step(picked)
            self._decode()

    def _drop_out(self) -> None:
        """Let go of requests that were cancelled or whose deadline is over, those that wait for the decoder too."""
        now = self._clock()
        for ticket in [*self._scheduler.jobs, *self._undecoded]:
            if ticket.cancelled:
                self._fail(ticket, Stopped(f"stopped after step {ticket.done} of {ticket.evaluations}"), "cancelled")
            elif ticket.deadline is not None and now > ticket.deadline:
                self._fail(ticket, Late(f"not finished within {ticket.deadline - ticket.arrived:g} s"), "late")

    def _fail(self, ticket: Ticket, error: Exception, count: str = "failed") -> None:
        self._leave(ticket)
        self.counts[count] += 1
        ticket.run = ticket.ask = None
        ticket.future.set_exception(error)

    def _leave(self, ticket: Ticket) -> None:
        with self._wake:
            if ticket in self._undecoded:
                self._undecoded.remove(ticket)
                self._scheduler.undecoded -= ticket.samples * ticket.weight
            else:
                self._scheduler.remove(ticket)

    def _start(self, ticket: Ticket) -> None:
        """Encode the prompts, and run the stages before the loop."""
        began = self._clock()
        try:
            ticket.run = self.pipe.run(ticket.request, host=True)
            ticket.rows = ticket.run.planned_rows or ticket.rows  # a cache decides as it goes
            self._advance(ticket, True)
            if ticket.ask is not None:
                ticket.ask.inputs(slice(0, ticket.places))
        except Exception as error:
            self._fail(ticket, error)
        ticket.stats.conditions += self._clock() - began
        self._charge("start", 1)

    def _step(self, tickets: Sequence[Ticket]) -> None:
        began = self._clock()
        try:
            answers: Sequence[Answer | Exception] = self._evaluate(tickets)
        except Exception as error:
            # Each of them alone: then only those fail that the engine fails for.
            answers = [error] if len(tickets) == 1 else [self._alone(ticket) for ticket in tickets]
        spent = self._clock() - began
        places = sum(ticket.places for ticket in tickets)
        rows = sum(ticket.ask.numbers.size for ticket in tickets if ticket.ask)
        self.counts.update(calls=1, rows=rows, samples=places)
        self.seconds["step"] += spent
        for ticket, answer in zip(tickets, answers, strict=True):
            ticket.stats.calls += 1
            ticket.stats.batched += places
            ticket.stats.steps += spent
            try:
                if isinstance(answer, Exception):
                    raise answer
                self._tell(ticket, answer)
            except Exception as error:
                self._fail(ticket, error)
        self._charge("row", rows * tickets[0].weight)

    def _charge(self, what: str, units: float) -> None:
        """Take all time since the last charge for the cost of so many units.

        So an estimate has what a call of an engine has not: the Python around it, and its waits for the interpreter.
        """
        now = self._clock()
        spent, self._charged = now - self._charged, now
        self.costs.update(what, spent, units)

    def _alone(self, ticket: Ticket) -> Answer | Exception:
        try:
            return self._evaluate([ticket])[0]
        except Exception as error:
            return error

    def _evaluate(self, tickets: Sequence[Ticket]) -> list[Answer]:
        """Return each ticket's answer, from as few calls of the step stage as its largest batch allows."""
        state = tickets[0].sized.pipe.manifest.state.name
        asks = [ticket.ask for ticket in tickets if ticket.ask]
        inputs = side_by_side([ask.inputs(slice(0, len(ask.state))) for ask in asks])
        inputs[state] = np.concatenate([ask.state for ask in asks]).astype(np.float32)
        outputs = tickets[0].sized.call(inputs, len(inputs[state]))
        predictions, variances = outputs["prediction"], outputs.get("variance")
        answers: list[Answer] = []
        first = 0
        for ask in asks:
            own = slice(first, first := first + len(ask.state))
            answers.append((predictions[own], None if variances is None else variances[own]))
        return answers

    def _tell(self, ticket: Ticket, answer: Answer) -> None:
        """Let the run go its step; those that need no network are gone with it."""
        assert ticket.run is not None
        more = ticket.run.tell(*answer)
        self._advance(ticket, more, self._preview(ticket))

    def _finish(self, ticket: Ticket) -> None:
        """Let a request leave the line for the decoder's."""
        self._leave(ticket)
        with self._wake:
            self._undecoded.append(ticket)
            self._scheduler.undecoded += ticket.samples * ticket.weight

    def _advance(self, ticket: Ticket, more: bool, shown: images.Pictures | None = None) -> None:
        """Find what the next call of a run needs, and go steps that need no network; say how far it is, and show the
        last preview on the way."""
        run = ticket.run
        assert run is not None
        ticket.ask = None
        while more and ticket.ask is None:
            if ask := run.ask():
                size = ticket.sized.pipe.manifest.size
                ticket.ask, ticket.kind, ticket.places = ask, (size, len(ask.numbers)), len(ask.state)
            else:
                more = run.tell()
                shown = shown if (drawn := self._preview(ticket)) is None else drawn
        ticket.done, ticket.left = run.done, ticket.samples * max(0, ticket.rows - run.rows)
        if ticket.listener and run.done:
            ticket.listener(run.done, ticket.evaluations, shown)
        if ticket.ask is None:
            self._finish(ticket)

    def _preview(self, ticket: Ticket) -> images.Pictures | None:
        """Return the pictures that the request would have now, where some are asked for after this step."""
        run = ticket.run
        if run is None or run.last is None or run.done not in ticket.previews:
            return None
        return preview.pictures(ticket.sized.pipe, ticket.previews[run.done], *run.last)

    def _decode(self) -> None:
        """Decode the picture that has waited longest; where more wait than a call has samples, all but so many."""
        for _ in range(max(1, len(self._undecoded) - self.places)):
            if not self._undecoded:
                return
            ticket, began = self._undecoded[0], self._clock()
            try:
                assert ticket.run is not None
                result = ticket.run.result()
            except Exception as error:
                self._fail(ticket, error)
                continue
            now = self._clock()
            self._leave(ticket)
            ticket.stats.decode, ticket.stats.total = now - began, now - ticket.arrived
            self._charge("decode", ticket.samples * ticket.weight)
            self.seconds["decode"] += ticket.stats.decode
            self.counts["drawn"] += ticket.samples
            ticket.run = None
            ticket.future.set_result(result)
