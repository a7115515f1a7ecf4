"""A request in the batcher: its place in the line, its result to come, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.request import Request
from dit_runtime.sampling.schedule import Level
from dit_runtime.serve.scheduler import Job

if TYPE_CHECKING:
    from dit_runtime.run import Ask, Run
    from dit_runtime.serve.rows import Sized

# Called in the batcher's thread after each of a request's steps: evaluations done, evaluations in all, and the pictures
# that the request would have now where a preview was asked for. It must return at once and raise nothing.
Listener = Callable[[int, int, NDArray[np.uint8] | None], object]


class Busy(Exception):
    """The request could not be finished by its deadline, or others could not because of it."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too busy to finish in time; try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class Late(Exception):
    """The deadline passed before the request was finished."""


class Closed(Exception):
    """The batcher takes no more requests."""


@dataclass
class Stats:
    """Seconds, and the batches that a request was in."""

    queue: float = 0.0  # until it started
    conditions: float = 0.0  # checks, prompts, and the stages before the loop
    steps: float = 0.0  # in calls of the step stage
    decode: float = 0.0
    total: float = 0.0  # from arrival to result
    calls: int = 0
    batched: int = 0  # samples in these calls, its own among them

    @property
    def batch(self) -> float:
        """Return the mean number of samples in its calls."""
        return self.batched / self.calls if self.calls else 0.0


@dataclass(eq=False, kw_only=True)
class Ticket(Job):
    """A handle on a submitted request, as `Batcher.submit` returns it."""

    request: Request
    sized: Sized
    evaluations: int
    rows: int  # of a sample, evaluations times groups, before the run has started
    listener: Listener | None = None
    previews: Mapping[int, Level] = field(default_factory=dict)  # after which evaluations the listener gets pictures
    stats: Stats = field(default_factory=Stats)
    done: int = 0  # evaluations
    cancelled: bool = False
    run: Run | None = None
    ask: Ask | None = None
    future: Future[NDArray[Any]] = field(default_factory=Future)

    def __post_init__(self) -> None:
        # A future that runs cannot be cancelled, and so `set_result` cannot raise in the batcher's thread.
        self.future.set_running_or_notify_cancel()

    def cancel(self) -> None:
        """Leave the batch before its next call; any thread may call this."""
        self.cancelled = True

    def result(self, timeout: float | None = None) -> NDArray[Any]:
        """Wait for the pictures; raise what went wrong, Late, or Stopped after `cancel`."""
        return self.future.result(timeout)
