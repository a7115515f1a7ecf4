"""The HTTP API: images and jobs as OpenAI's clients know them, health, metrics, and a page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import math
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from dit_runtime.serve import Busy
from dit_serve.body import OUTPUTS, Body, Limits, parse, parse_edit
from dit_serve.drawing import Drawing, encode, fault, timing
from dit_serve.faults import Fault, answer_bug, answer_fault, answer_http, retry_after
from dit_serve.form import parse_form
from dit_serve.guard import LOCAL, Guard
from dit_serve.jobs import Job, Jobs
from dit_serve.metrics import Metrics
from dit_serve.models import Model

PAGE = Path(__file__).with_name("page.html")
EDITS = "/v1/images/edits"
EDITING = 4  # requests with pictures at a time: each may have as many bytes as a form, and its pixels
LAST = 1.0  # seconds for jobs to say that they were stopped
WAITING = 400  # requests for images at a time; more connections than that are left for others
log = logging.getLogger("dit_serve")


@dataclass(frozen=True)
class Settings:
    deadline: float = 60.0  # seconds from a request to its images
    job_deadline: float = 600.0
    grace: float = 30.0  # seconds that work under way gets after SIGTERM
    limits: Limits = field(default_factory=Limits)
    key: bytes | None = None  # clients send it as "Authorization: Bearer KEY"
    hosts: Collection[str] = LOCAL  # what clients may call this server where there is no key


class Service:
    """The models, and what is under way for them."""

    def __init__(self, models: Mapping[str, Model], settings: Settings) -> None:
        self.models, self.settings = models, settings
        self.metrics, self.jobs = Metrics(models), Jobs()
        self.draining = False
        self.waiting = 0  # requests for images that are read or drawn
        self.editing = 0  # of those, the ones that bring pictures
        self._deadlines = {"/v1/images/generations": settings.deadline, "/v1/jobs": settings.job_deadline}
        self._deadlines[EDITS] = settings.deadline
        self._until = math.inf  # by the clock, when work under way is stopped
        self._tasks: set[asyncio.Task[None]] = set()

    def app(self, replicas: bool = False) -> ASGIApp:
        """Return the application; without jobs and the page where `replicas` answer for it, for a job lives in one."""
        routes = [
            Route("/healthz", self.health),
            Route("/readyz", self.ready),
            Route("/metrics", self.scrape),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/images/generations", self.generate, methods=["POST"]),
            Route(EDITS, self.edit, methods=["POST"]),
        ]
        own = [
            Route("/", self.page),
            Route("/v1/jobs", self.start_job, methods=["POST"]),
            Route("/v1/jobs/{job}", self.show_job, methods=["GET"]),
            Route("/v1/jobs/{job}", self.stop_job, methods=["DELETE"]),
            Route("/v1/jobs/{job}/events", self.follow_job),
        ]
        handlers: Any = {Fault: answer_fault, HTTPException: answer_http, Exception: answer_bug}
        routes += [] if replicas else own
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        settings = self.settings
        forms = {EDITS: settings.limits.form}
        return Guard(app, settings.key, settings.hosts, settings.limits.body, self._refuse, forms)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGHUP, lambda: self._keep(self.swap()))
        yield
        self.drain()  # where no signal has
        await self._wait(max(0, self._until - time.monotonic()))
        for model in self.models.values():
            await asyncio.to_thread(model.close)
        await self._wait(LAST)

    async def _wait(self, seconds: float) -> None:
        """Let what is under way end by itself."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    def drain(self) -> None:
        """Take no more requests; what is under way has the grace from now on."""
        if not self.draining:
            self.draining, self._until = True, time.monotonic() + self.settings.grace

    async def swap(self) -> None:
        """Serve what the bundles' folders hold now; a model whose new bundle is refused keeps the old one."""
        for model in self.models.values():
            await asyncio.to_thread(model.swap)

    def _keep(self, work: Any) -> None:
        """Run a coroutine to its end, whoever has asked for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What is drawn

    def _refuse(self, scope: Scope) -> Fault | None:
        """Return why a request is refused, whatever its body says; in overload most end here: it must cost little."""
        deadline = self._deadlines.get(scope["path"]) if scope["method"] == "POST" else None
        if deadline is None:
            return None
        refused, name = None, ""
        if self.draining:
            refused = Fault(503, "the server is shutting down", headers={"Retry-After": "1", "Connection": "close"})
        else:  # which of several models, only the body says: there is no room where none of them has any
            name = next(iter(self.models)) if len(self.models) == 1 else ""
            refused = _busy(self.models.values(), deadline)
        if refused is None and self.waiting >= WAITING and scope["path"] != "/v1/jobs":  # which are answered at once
            refused = Fault(429, f"{WAITING} requests wait for their images", headers=retry_after(1))
        if refused is None and scope["path"] == EDITS and self.editing >= EDITING:
            refused = Fault(429, f"{EDITING} requests with pictures are under way", headers=retry_after(1))
        if refused is not None:
            self.metrics.answer(name, refused.status, 0.0)
        return refused

    def _find(self, request: Request, body: Body) -> Model:
        """Return the model that draws a body; raise a Fault where it cannot."""
        name = body.model if body.model is not None else next(iter(self.models))
        request.scope["fields"] |= {"model": name[:100], "images": body.n}
        if name not in self.models:
            raise Fault(404, f"this server has no such model; it has {', '.join(self.models)}", "model")
        model = self.models[name]
        if len(self.models) > 1 and (busy := _busy([model], self._deadlines[request.scope["path"]])):
            raise busy
        model.check(body, self.settings.limits)
        return model

    async def generate(self, request: Request) -> Response:
        return await self._counted(request, self._generate)

    async def edit(self, request: Request) -> Response:
        self.editing += 1
        try:
            return await self._counted(request, self._edit)
        finally:
            self.editing -= 1

    async def _counted(self, request: Request, respond: Callable[[Request], Awaitable[Response]]) -> Response:
        began, code = time.monotonic(), 500
        self.waiting += 1
        try:
            response = await respond(request)
            code = response.status_code
            return response
        except Fault as error:
            code = error.status
            raise
        finally:
            self.waiting -= 1
            model = request.scope["fields"].get("model", "")
            self.metrics.answer(model, code, time.monotonic() - began)

    async def _generate(self, request: Request) -> Response:
        body = parse(await _content(request), self.settings.limits)
        return await self._draw(request, self._find(request, body), body)

    async def _edit(self, request: Request) -> Response:
        parts = parse_form(request.headers["content-type"], await _content(request))
        body = parse_edit(parts, self.settings.limits)
        model = self._find(request, body)
        return await self._draw(request, model, await asyncio.to_thread(model.read, body))

    async def _draw(self, request: Request, model: Model, body: Body) -> Response:
        drawing = Drawing(model, body, self.settings.deadline)
        pictures = asyncio.ensure_future(drawing.pictures())
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait([pictures, gone], return_when=asyncio.FIRST_COMPLETED)
            if not pictures.done():
                return Response(status_code=499)
            drawn = pictures.result()
        finally:
            gone.cancel()
            pictures.cancel()
            drawing.cancel()  # no more than a flag where the images are drawn
        request.scope["fields"] |= self._account(drawing)
        if body.response_format == "bytes":
            content = await asyncio.to_thread(encode, drawn[0], body.output_format)
            headers = {"X-Seed": str(drawing.tickets[0].request.seed), "Server-Timing": timing(drawing.stats(0))}
            return Response(content, media_type=OUTPUTS[body.output_format], headers=headers)
        return JSONResponse(await drawing.answer(drawn), headers={"Server-Timing": timing(drawing.stats(0))})

    def _account(self, drawing: Drawing) -> dict[str, float]:
        """Count what was drawn, and return what the first image cost, for the log."""
        for ticket in drawing.tickets:
            self.metrics.image(drawing.model.name, ticket.stats)
        return drawing.stats(0)

    # Jobs

    async def start_job(self, request: Request) -> Response:
        began, code = time.monotonic(), 202
        try:
            body = parse(await _content(request), self.settings.limits)
            model = self._find(request, body)
            if body.response_format == "bytes":
                raise Fault(400, "a job's images are b64_json", "response_format")
            job = self.jobs.add()
            try:
                drawing = Drawing(model, body, self.settings.job_deadline, lambda *event: self._heard(job, *event))
            except BaseException:
                self.jobs.forget(job)
                raise
            job.progress = [(0, ticket.evaluations) for ticket in drawing.tickets]
            job.cancel = drawing.cancel
            self._keep(self._finish(job, drawing))
            return JSONResponse(job.describe(), 202, headers={"Location": f"/v1/jobs/{job.id}"})
        except Fault as error:
            code = error.status
            raise
        finally:
            self.metrics.answer(request.scope["fields"].get("model", ""), code, time.monotonic() - began)

    def _heard(self, job: Job, image: int, done: int, total: int, preview: NDArray[np.uint8] | None) -> None:
        if job.ended:  # by another image's failure
            return
        job.progress[image] = done, total
        if preview is not None:
            self._keep(self._show(job, image, done, preview[0]))
        job.change("running")

    async def _show(self, job: Job, image: int, number: int, picture: NDArray[np.uint8]) -> None:
        content = await asyncio.to_thread(encode, picture, "png")
        if not job.ended and job.previews.get(image, (0, ""))[0] < number:
            job.previews[image] = number, base64.b64encode(content).decode()
            job.change()

    async def _finish(self, job: Job, drawing: Drawing) -> None:
        fields: dict[str, Any] = {"job": job.id, "model": drawing.model.name}
        try:
            pictures = await drawing.pictures()
            answer = await drawing.answer(pictures)
            fields |= self._account(drawing)
            self.jobs.finish(job, "succeeded", answer)
        except Fault as error:
            if error.status >= 500:
                log.error("job failed", extra={"fields": fields}, exc_info=error.__cause__)
            self.jobs.finish(job, "cancelled" if error.status == 499 else "failed", error.body)
        except Exception as error:  # of the library that encodes, for one
            log.error("job failed", extra={"fields": fields}, exc_info=error)
            bug = Fault(500, "internal error; the server's log says more under this job's id")
            self.jobs.finish(job, "failed", bug.body)
        log.info("job ended", extra={"fields": fields | {"status": job.status}})

    async def show_job(self, request: Request) -> Response:
        return JSONResponse(self.jobs.get(request.path_params["job"]).describe())

    async def stop_job(self, request: Request) -> Response:
        job = self.jobs.get(request.path_params["job"])
        self.jobs.remove(job)
        return JSONResponse({"id": job.id, "object": "image.job", "deleted": True})

    async def follow_job(self, request: Request) -> Response:
        job = self.jobs.get(request.path_params["job"])

        async def lines() -> AsyncIterator[str]:
            async for name, table in job.events():
                yield f"event: {name}\ndata: {json.dumps(table)}\n\n" if name else ": still here\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    # Everything else

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model.describe() for model in self.models.values()]})

    async def one_model(self, request: Request) -> Response:
        if request.path_params["name"] not in self.models:
            raise Fault(404, f"this server has no such model; it has {', '.join(self.models)}", "model")
        return JSONResponse(self.models[request.path_params["name"]].describe())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Answer 200 where every model draws; say of each whether it does, and why its last swap was refused."""
        table = {name: {"alive": model.batcher.alive, "refused": model.refusal} for name, model in self.models.items()}
        sound = not self.draining and all(model.batcher.alive for model in self.models.values())
        return JSONResponse({"ready": sound, "models": table}, 200 if sound else 503)

    async def scrape(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def page(self, request: Request) -> Response:
        content = PAGE.read_text(encoding="utf-8")
        (script,) = re.findall(r"<script>(.*?)</script>", content, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'"
        policy += f"; script-src 'sha256-{digest}'; form-action 'none'; frame-ancestors 'none'"
        headers = {"Content-Security-Policy": policy}
        return Response(content, media_type="text/html; charset=utf-8", headers=headers)


def _busy(models: Collection[Model], deadline: float) -> Fault | None:
    """Return the refusal of a request, whatever it asks for, where each of the models has too much to do."""
    late = min(model.batcher.lateness(deadline) for model in models)
    if late <= 0:
        return None
    if len(models) == 1:  # else nobody knows whose request it was
        next(iter(models)).batcher.counts["refused"] += 1
    return fault(Busy(late))


async def _content(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise Fault(499, "the client left") from None


async def _disconnected(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
