"""A request for images under way in a batcher, as the event loop sees it."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime import images
from dit_runtime.errors import EngineError, Stopped, UsageError
from dit_runtime.serve import Busy, Closed, Late, Ticket
from dit_serve.body import Body
from dit_serve.faults import Fault, refusal, retry_after
from dit_serve.models import Model

Heard = Callable[[int, int, int, NDArray[np.uint8] | None], object]  # image, evaluations done and in all, its preview


class Drawing:
    """A ticket for each image. All of them are taken, or none."""

    def __init__(self, model: Model, body: Body, deadline: float, heard: Heard | None = None) -> None:
        """Put the images in line; raise a Fault where they cannot be drawn, or not in time.

        `heard` is called in the event loop after each step of an image.
        """
        self.model, self.body, self.created = model, body, int(time.time())
        self.tickets: list[Ticket] = []
        loop = asyncio.get_running_loop()

        def listener(image: int) -> Callable[[int, int, NDArray[np.uint8] | None], object] | None:
            if heard is None:
                return None
            call = lambda *event: loop.call_soon_threadsafe(heard, image, *event)  # noqa: E731
            return call

        try:
            for image, request in enumerate(model.requests(body)):
                options: dict[str, Any] = {"listener": listener(image), "previews": body.previews}
                self.tickets.append(model.submit(request, deadline=deadline, **options))
        except (Busy, Closed, UsageError) as error:
            self.cancel()
            raise fault(error) from None

    def cancel(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()

    async def pictures(self) -> list[NDArray[np.uint8]]:
        """Wait for all images; where one fails, cancel the others and raise its Fault."""
        try:
            results = await asyncio.gather(*(asyncio.wrap_future(ticket.future) for ticket in self.tickets))
        except Exception as error:
            self.cancel()
            raise fault(error) from error
        return [result[0] for result in results]

    def stats(self, image: int) -> dict[str, float]:
        """Return what an image cost: milliseconds, and the mean number of images in its calls."""
        stats = self.tickets[image].stats
        spent = {f"{name}_ms": round(1e3 * value, 2) for name, value in asdict(stats).items() if name not in COUNTS}
        return spent | {"calls": stats.calls, "batch": round(stats.batch, 2)}

    async def answer(self, pictures: list[NDArray[np.uint8]]) -> dict[str, Any]:
        """Return the answer's JSON: OpenAI's fields, and each image's seed and cost."""
        seeds = [ticket.request.seed for ticket in self.tickets]
        encoded = [await asyncio.to_thread(encode, picture, self.body.output_format) for picture in pictures]
        return {
            "created": self.created,
            "model": self.model.name,
            "size": f"{pictures[0].shape[1]}x{pictures[0].shape[0]}",
            "output_format": self.body.output_format,
            "data": [
                {"b64_json": base64.b64encode(content).decode(), "seed": seed, "stats": self.stats(image)}
                for image, (content, seed) in enumerate(zip(encoded, seeds, strict=True))
            ],
        }


COUNTS = ("calls", "batched")


def timing(stats: Mapping[str, float]) -> str:
    """Return an image's cost as the header Server-Timing has it."""
    return ", ".join(f"{name[:-3]};dur={value}" for name, value in stats.items() if name.endswith("_ms"))


def encode(picture: NDArray[np.uint8], kind: str) -> bytes:
    """Return an image file; the runtime writes PNGs itself, Pillow the others."""
    if kind == "png":
        return images.png(picture)
    try:
        from PIL import Image
    except ImportError:
        raise Fault(400, f"output_format {kind} needs Pillow on the server; take png", "output_format") from None
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind.upper(), quality=95)
    return file.getvalue()


def fault(error: Exception) -> Fault:
    """Return what a client gets to read of an error; what an engine says stays in the log."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, Busy):
        return Fault(429, str(error), headers=retry_after(error.retry_after))
    if isinstance(error, Closed):
        return Fault(503, "the server is being replaced; try again", headers=retry_after(1))
    if isinstance(error, UsageError):
        return refusal(error)
    if isinstance(error, Late):
        return Fault(504, str(error))
    if isinstance(error, Stopped):
        return Fault(499, "the request was cancelled")
    what = "an engine failed" if isinstance(error, EngineError) else "internal error"
    return Fault(500, f"{what}; the server's log says more under this request's id")
