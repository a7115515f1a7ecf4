"""A bundle inside Triton Inference Server: the class that `model.py` of its Python backend imports from here.

`dit-export triton` writes the repository. A request has the fields of the HTTP API as tensors. Its images are drawn
step by step with those of all other requests: `execute` only puts them in line, and a thread sends what is drawn.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.errors import EngineError, UsageError
from dit_runtime.serve import Ticket
from dit_serve.body import Body, Limits, parse
from dit_serve.drawing import fault
from dit_serve.faults import Fault
from dit_serve.metrics import COUNTERS
from dit_serve.models import Model, Opening

TICK = 0.02  # seconds between two looks at whether clients have left
SCRAPE = 0.5  # and between two updates of the metrics
CODES = {400: "INVALID_ARG", 404: "NOT_FOUND", 429: "UNAVAILABLE", 499: "CANCELLED", 503: "UNAVAILABLE"}
log = logging.getLogger("dit_serve")


class Pending:
    """A request whose images are being drawn, and who sends them."""

    def __init__(self, sender: Any, tickets: Sequence[Ticket]) -> None:
        self.sender, self.tickets, self.left = sender, tickets, len(tickets)

    def cancel(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()


class TritonPythonModel:
    """One instance of a model; Triton calls its three methods."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open and verify the bundle beside model.py, and measure its step stage."""
        import triton_python_backend_utils as backend

        self._backend: Any = backend
        config = json.loads(args["model_config"])
        values = {key: entry["string_value"] for key, entry in config.get("parameters", {}).items()}
        self._fields = [entry["name"] for entry in config["input"]]
        self._decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled"))
        self._deadline = float(values.get("deadline", 60))
        limits = {name: int(values[f"max_{name}"]) for name in ("images", "steps", "pixels") if f"max_{name}" in values}
        self._limits = Limits(**limits)
        threads, provider = values.get("threads"), values.get("provider")
        folder = Path(args["model_repository"], args["model_version"], "bundle")
        try:
            opening = Opening(int(threads) if threads else None, provider, public_key=_key(values.get("public_key")))
            self.model = Model(args["model_name"], folder, opening)
        except (UsageError, EngineError, OSError) as error:
            raise backend.TritonModelException(str(error)) from None
        self._pending: set[Pending] = set()  # the thread's own, but for what `execute` adds
        self._drawn: queue.SimpleQueue[tuple[Pending, int, Future[NDArray[Any]]] | None] = queue.SimpleQueue()
        self._metrics = _Metrics(backend, self.model)
        sys.unraisablehook = _without_capsules
        self._thread = threading.Thread(target=self._loop, name="triton", daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Put the images of each request in line; what is refused is answered at once."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                body = self._read(request)
                tickets = self._submit(body, min(request.timeout() / 1e6 or self._deadline, self._deadline))
            except Exception as error:
                self._refuse(sender, error)
                continue
            pending = Pending(sender, tickets)
            self._pending.add(pending)
            for image, ticket in enumerate(tickets):
                ticket.future.add_done_callback(partial(self._hand_over, pending, image))

    def finalize(self) -> None:
        """Stop what is under way, and close the bundle."""
        self.model.close()
        self._drawn.put(None)
        self._thread.join()

    def _read(self, request: Any) -> Body:
        fields: dict[str, Any] = {}
        for name in self._fields:
            tensor = self._backend.get_input_tensor_by_name(request, name)
            if tensor is None:
                continue
            values = np.from_dlpack(tensor).ravel()  # `as_numpy` is wrong with NumPy 2 before Triton 24.12
            if len(values) > self._limits.body:
                raise Fault(400, f"{name} has more than {self._limits.body} values", name)
            if values.dtype == np.uint8:
                fields[name] = _decode(name, values.tobytes())
            elif len(values) == 1 and np.isfinite(values[0]):
                fields[name] = values[0].item()
            else:
                raise Fault(400, f"{name} must be one finite number", name)
        body = parse(json.dumps(fields).encode(), self._limits)
        self.model.check(body, self._limits)
        return body

    def _submit(self, body: Body, deadline: float) -> list[Ticket]:
        """Put all images in line, or none."""
        tickets: list[Ticket] = []
        try:
            for request in self.model.requests(body):
                tickets.append(self.model.submit(request, deadline=deadline))
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return tickets

    def _hand_over(self, pending: Pending, image: int, future: Future[NDArray[Any]]) -> None:
        """Leave an image to the thread that sends: the batcher's own must not wait."""
        self._drawn.put((pending, image, future))

    def _loop(self) -> None:
        """Send finished images, drop requests whose clients have left, and update the metrics."""
        looked = scraped = time.monotonic()
        while True:
            try:
                drawn = self._drawn.get(timeout=TICK)
            except queue.Empty:
                pass
            else:
                if drawn is None:
                    return
                try:
                    self._answer(*drawn)
                except Exception as error:  # Triton does not take an answer: others still get theirs
                    log.error("not sent", exc_info=error)
            now = time.monotonic()
            if now - looked >= TICK:
                looked = now
                for pending in [*self._pending]:
                    if pending.sender.is_cancelled():
                        pending.cancel()
            if now - scraped >= SCRAPE:
                scraped = now
                self._metrics.update()

    def _answer(self, pending: Pending, image: int, future: Future[NDArray[Any]]) -> None:
        """Send an image, or where a response has all of them, the last one's; of several errors the first."""
        if pending not in self._pending:
            return
        pending.left -= 1
        ready = [pending.tickets[image]] if self._decoupled else [] if pending.left else pending.tickets
        try:
            if error := future.exception():
                raise error
            if ready:
                self._send(pending, ready)
        except Exception as error:
            self._pending.remove(pending)
            pending.cancel()
            self._refuse(pending.sender, error)

    def _send(self, pending: Pending, tickets: Sequence[Ticket]) -> None:
        backend = self._backend
        seeds = np.array([ticket.request.seed for ticket in tickets], np.uint64)
        images = np.ascontiguousarray(np.concatenate([ticket.result() for ticket in tickets]))
        # By DLPack: with NumPy 2 backends before 24.12 make an empty tensor of an array.
        outputs = [backend.Tensor.from_dlpack(name, array) for name, array in (("images", images), ("seeds", seeds))]
        flags = 0 if pending.left else backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        pending.sender.send(backend.InferenceResponse(outputs), flags=flags)
        if not pending.left:
            self._pending.remove(pending)

    def _refuse(self, sender: Any, error: BaseException) -> None:
        backend, answer = self._backend, fault(error)  # type: ignore[arg-type]
        if answer.status == 500:
            log.error("failed", exc_info=error)
        code = getattr(backend.TritonError, CODES.get(answer.status, "INTERNAL"))
        response = backend.InferenceResponse(error=backend.TritonError(answer.message, code))
        sender.send(response, flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _key(digits: str | None) -> bytes | None:
    try:
        return None if digits is None else bytes.fromhex(digits)
    except ValueError:
        raise UsageError("public_key is no hexadecimal number") from None


def _without_capsules(event: sys.UnraisableHookArgs) -> None:
    """Print what nobody can catch, but for what NumPy says of each tensor sent: Triton renames its capsule."""
    if str(event.exc_value) != "PyCapsule_GetPointer called with incorrect name":
        sys.__unraisablehook__(event)


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise Fault(400, f"{name} is not UTF-8", name) from None


class _Metrics:
    """The batcher's counts among Triton's metrics, by the names that dit-serve has."""

    def __init__(self, backend: Any, model: Model) -> None:
        self._model = model

        def metric(name: str, text: str, kind: str) -> Any:
            family = backend.MetricFamily(name=name, description=text, kind=getattr(backend.MetricFamily, kind))
            self._families.append(family)  # a metric ends with its family
            return family.Metric(labels={"model": model.name})

        self._families: list[Any] = []
        counters = {count: metric(f"{name}_total", text, "COUNTER") for name, (count, text) in COUNTERS.items()}
        self._counters, self._counted = counters, dict.fromkeys(counters, 0)
        self._gauges = {
            "queued": metric("dit_queued_images", "waiting to be started", "GAUGE"),
            "active": metric("dit_active_images", "under way", "GAUGE"),
            "places": metric("dit_batch_places", "samples that may share a call", "GAUGE"),
        }

    def update(self) -> None:
        batcher = self._model.batcher
        for count, counter in self._counters.items():
            value = batcher.counts[count]
            if value != self._counted[count]:
                counter.increment(value - self._counted[count])
                self._counted[count] = value
        for name, gauge in self._gauges.items():
            gauge.set(getattr(batcher, name))
