"""Images that are drawn while nobody waits: their progress, previews and results, for a while."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from dit_runtime.facts import LIMITS
from dit_serve.faults import Fault

KEPT = 600.0  # seconds that a finished job's images stay
MOST = 256  # jobs, finished ones included
BEAT = 10.0  # seconds of silence after which a stream gets a comment, so that what is gone is noticed


class Job:
    """A request under way. Its state changes in the event loop alone."""

    def __init__(self) -> None:
        self.id, self.created = secrets.token_urlsafe(16), time.time()
        self.status = "queued"  # then running; succeeded, failed or cancelled at the end
        self.progress: list[tuple[int, int]] = []  # evaluations done and in all, of each image
        self.previews: dict[int, tuple[int, str]] = {}  # the last one of each image: its number and base64
        self.result: dict[str, Any] = {}
        self.cancel: Callable[[], object] = lambda: None
        self.ended = 0.0  # monotonic
        self.bytes = 0  # of its finished images, as text
        self._changed = asyncio.Event()

    def change(self, status: str | None = None) -> None:
        """Wake those who follow."""
        self.status = status or self.status
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def finish(self, status: str, result: dict[str, Any]) -> None:
        self.result, self.ended = result, time.monotonic()
        self.bytes = sum(len(image["b64_json"]) for image in result.get("data", []))
        self.previews.clear()
        self.change(status)

    def describe(self) -> dict[str, Any]:
        done, total = (sum(numbers) for numbers in zip(*self.progress, strict=True)) if self.progress else (0, 0)
        return {
            "id": self.id,
            "object": "image.job",
            "created": int(self.created),
            "status": self.status,
            "steps_done": done,
            "steps": total,
            **({"result": self.result} if self.status == "succeeded" else self.result),  # or the error
        }

    async def events(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Yield what is new until the end. Who reads slowly gets the latest state, not all states."""
        numbers: dict[int, int] = {}
        shown: list[tuple[int, int]] | None = None
        while True:
            changed = self._changed
            for image, (number, preview) in sorted(self.previews.items()):
                if numbers.get(image) != number:
                    numbers[image] = number
                    yield "preview", {"image": image, "number": number, "b64_json": preview}
            if self.ended:
                yield self.status, self.describe()
                return
            if self.progress != shown:
                shown = [*self.progress]
                yield "progress", self.describe()
            try:
                await asyncio.wait_for(changed.wait(), BEAT)
            except TimeoutError:
                yield "", {}


class Jobs:
    def __init__(self, kept: float = KEPT, most: int = MOST, most_bytes: int = LIMITS["job_bytes"]) -> None:
        self._jobs: dict[str, Job] = {}  # the oldest first
        self._kept, self._most, self._most_bytes = kept, most, most_bytes

    def add(self) -> Job:
        """Make room, and take a job; raise Fault(429) where all that are here are under way."""
        now = time.monotonic()
        for job in [job for job in self._jobs.values() if job.ended and now - job.ended > self._kept]:
            del self._jobs[job.id]
        if len(self._jobs) >= self._most:
            oldest = next((job for job in self._jobs.values() if job.ended), None)
            if oldest is None:
                raise Fault(429, f"{self._most} jobs are under way", headers={"Retry-After": "5"})
            del self._jobs[oldest.id]
        job = Job()
        self._jobs[job.id] = job
        return job

    def finish(self, job: Job, status: str, result: dict[str, Any]) -> None:
        """End a job; forget those that ended first while all finished images have too many bytes.

        The last one stays.
        """
        job.finish(status, result)
        drawn = sorted((job for job in self._jobs.values() if job.bytes), key=lambda job: job.ended)
        while len(drawn) > 1 and sum(job.bytes for job in drawn) > self._most_bytes:
            self.forget(drawn.pop(0))

    def get(self, name: str) -> Job:
        job = self._jobs.get(name)
        if job is None or (job.ended and time.monotonic() - job.ended > self._kept):
            raise Fault(404, "no job has this id; finished jobs are forgotten after a while")
        return job

    def remove(self, job: Job) -> None:
        """Stop a job that is under way; forget one that has ended."""
        if job.ended:
            self.forget(job)
        else:
            job.cancel()

    def forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)

    def __len__(self) -> int:
        return sum(not job.ended for job in self._jobs.values())
